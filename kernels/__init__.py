"""Mamba kernels: one CUDA core behind a C ABI, and Triton versions under the same names."""
