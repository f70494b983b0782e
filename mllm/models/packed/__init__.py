"""Attention over packed rows by kernels that know where each sample begins."""
