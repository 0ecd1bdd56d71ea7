"""``python -m benchmarks.tables``."""

from benchmarks.tables.pages import main

if __name__ == "__main__":
    main()
