"""Triton kernels of what a layer does beside its scan."""
