"""Time, memory and traffic of training steps, ours beside the rivals."""
