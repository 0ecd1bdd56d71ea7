"""``python -m benchmarks.finetune``."""

from benchmarks.finetune.study import main

if __name__ == "__main__":
    main()
