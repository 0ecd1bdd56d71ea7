"""What measures every number of README and docs: see ``benchmarks/README.md``."""
