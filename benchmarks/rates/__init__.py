"""Runs measured against the bounds of ``raclora_jax.theory``."""
