"""Rows and their forms, the prompts around them, and the tokens that a model learns from them."""
