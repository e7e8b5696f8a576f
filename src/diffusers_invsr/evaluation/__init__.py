"""Measuring models on test sets (section 4 of the paper): test sets, runs, metrics, tables, pictures."""

from .degraded_sets import DegradedSet, make_test_set
from .evaluate import Evaluator, ImageResult, Sampling, evaluate
from .metric_suite import METRICS, MetricSuite
from .pictures import save_plot, save_sheets
from .report import Evaluation, Run


__all__ = [
    "METRICS",
    "Evaluation",
    "Evaluator",
    "ImageResult",
    "MetricSuite",
    "Run",
    "Sampling",
    "DegradedSet",
    "evaluate",
    "make_test_set",
    "save_plot",
    "save_sheets",
]
