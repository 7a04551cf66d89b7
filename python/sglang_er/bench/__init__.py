"""Measurements of this machine and of the kernels on it; no server is involved."""
