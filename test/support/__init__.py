"""Shared test machinery: real servers, checkpoints, clients, statistics."""
