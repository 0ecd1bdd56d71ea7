"""A model's program, run with stand-ins for its leaves."""
