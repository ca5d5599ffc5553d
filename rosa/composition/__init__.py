"""Composition of tasks by rotations behind decoder layers, and interchange intervention (RoAd's paper)."""
