"""Fused kernels of RoSA: tensors in, tensors out. Needs torch, and triton for the GPU."""

from rosa_kernels.dispatch import available_backends, roae, rope_roae
from rosa_kernels.reference import roae_reference, rope_roae_reference, signals

__all__ = ["available_backends", "roae", "roae_reference", "rope_roae", "rope_roae_reference", "signals"]
