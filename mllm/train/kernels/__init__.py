"""Triton kernels, imported where a CUDA device computes and nowhere else."""
