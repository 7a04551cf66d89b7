"""Compiled CPU kernels (csrc/cpu), bound through tvm-ffi: no dependency on the PyTorch ABI."""
