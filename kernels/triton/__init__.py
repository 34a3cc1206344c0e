"""The ops in Triton, under the names and signatures of the torch ops: for GPUs without the CUDA kernel library.

Triton compiles at first use and needs no compiler on the machine. :mod:`mamba_export.ops.dispatch` picks between the
CUDA library, these and the reference.
"""
