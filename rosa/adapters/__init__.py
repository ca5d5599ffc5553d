"""What is attached to a model: adapters, their configurations, patch and switch, on disk and on the hub."""
