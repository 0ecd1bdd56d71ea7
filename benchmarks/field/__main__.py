"""``python -m benchmarks.field``."""

from benchmarks.field.study import main

if __name__ == "__main__":
    main()
