"""What `rosa demo` runs: a small base model made on the spot, fine-tuned with RoSA and with LoRA on the CPU."""
