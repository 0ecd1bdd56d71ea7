"""What the fine-tuning programs are made of."""
