"""Tasks, generation and evaluation."""
