"""Seeing what happens: where a model's activations are among the rotary frequencies, and how layer selection went."""
