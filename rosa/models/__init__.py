"""A Hugging Face model from outside: its decoder layers, what rotates and how, sharded weights. It knows no adapter."""
