"""Every method of ``raclora_jax.methods`` on one bench: seven tasks, one harness."""
