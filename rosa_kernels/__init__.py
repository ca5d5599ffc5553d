"""Fused kernels of rotary adapters, RoAE and RoAd: tensors in, tensors out. Needs torch, and triton for the GPU."""

from rosa_kernels.dispatch import available_backends, roae, rope_roae
from rosa_kernels.reference import roae_reference, rope_roae_reference, signals
from rosa_kernels.road_dispatch import road, rope_road, rope_road_fuses
from rosa_kernels.road_reference import road_reference, rope_road_reference

__all__ = [
    "available_backends",
    "road",
    "road_reference",
    "roae",
    "roae_reference",
    "rope_road",
    "rope_road_fuses",
    "rope_road_reference",
    "rope_roae",
    "rope_roae_reference",
    "signals",
]
