"""What the studies share: rows, timing, models, rivals, reading of compiled programs."""
