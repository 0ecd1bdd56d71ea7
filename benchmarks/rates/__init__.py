"""The paper's convex problems, and runs against the bounds of ``raclora_jax.theory``."""
