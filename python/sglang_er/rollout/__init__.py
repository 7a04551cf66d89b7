"""Rollouts against a running server: workload, client, measurement, report. It knows the server by HTTP only."""
