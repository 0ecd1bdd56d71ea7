"""Pretrained models fine-tuned by every method, learning rates tuned alike."""

import sys

from benchmarks.shared import rows

# BERT and the readers of llama2.c are written once, for users: in ``finetuning``.
sys.path.append(str(rows.ROOT / "examples"))
