"""Steps compiled for TPU slices, and runs that are killed or read damaged files."""
