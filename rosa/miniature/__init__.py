"""A small world to compare methods in: generated skills, and a base model that knows some of them."""
