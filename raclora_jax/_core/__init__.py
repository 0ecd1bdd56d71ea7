"""Arrays in, arrays out: no model, no optax rule."""
