"""``python -m benchmarks.federated``."""

from benchmarks.federated.study import main

if __name__ == "__main__":
    main()
