"""Triton kernels of what has no experts; those of the routed operations are in mot-kernels."""

OPTIONS = {"enable_fp_fusion": True}
"""What every launch says: Triton's default, but not from 3.10 on, of which 3.9 warns."""
