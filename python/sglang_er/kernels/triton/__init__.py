"""Triton kernels: one file an op, imported only where they are used (triton is no dependency of a CPU server)."""
