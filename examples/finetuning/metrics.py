"""What a task is judged by."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from scipy import stats
from sklearn import metrics

Metric = Callable[[np.ndarray, np.ndarray], float]


def _mean(*parts: Metric) -> Metric:
    return lambda truth, said: float(np.mean([part(truth, said) for part in parts]))


def _pearson(truth: np.ndarray, said: np.ndarray) -> float:
    return float(np.nan_to_num(stats.pearsonr(truth, said).statistic))


def _spearman(truth: np.ndarray, said: np.ndarray) -> float:
    return float(np.nan_to_num(stats.spearmanr(truth, said).statistic))


METRICS: dict[str, Metric] = {
    "accuracy": metrics.accuracy_score,
    "accuracy and F1": _mean(metrics.accuracy_score, metrics.f1_score),
    "Matthews correlation": metrics.matthews_corrcoef,
    "Pearson and Spearman": _mean(_pearson, _spearman),
}
