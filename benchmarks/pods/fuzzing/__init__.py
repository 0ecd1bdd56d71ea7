"""What the fuzzer damages: a module for each kind of thing that is read."""
