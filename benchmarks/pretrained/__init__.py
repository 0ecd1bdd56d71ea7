"""Pretrained models fine-tuned by every method, learning rates tuned alike."""
