"""Triton kernels of what has no experts; those of the routed operations are in mot-kernels."""
