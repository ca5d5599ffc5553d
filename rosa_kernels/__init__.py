"""Fused kernels of RoSA: tensors in, tensors out. Needs torch, and triton for the GPU."""

from rosa_kernels.dispatch import available_backends, rope_roae
from rosa_kernels.reference import rope_roae_reference

__all__ = ["available_backends", "rope_roae", "rope_roae_reference"]
