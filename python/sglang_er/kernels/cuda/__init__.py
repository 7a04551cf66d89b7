"""CUDA C++ kernels from csrc/cuda, one file an op; built by `sglang-er build-kernels` or at first use."""
