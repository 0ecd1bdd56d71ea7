"""Accuracy against bytes up, by every federated rule."""
