"""This project's own Triton kernels of the delta rule."""
