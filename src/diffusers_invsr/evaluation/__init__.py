"""Measuring models on test sets (section 4 of the paper): test sets, runs, metrics, tables, pictures."""

from .evaluate import Evaluator, ImageResult, Sampling, evaluate
from .metric_suite import METRICS, MetricSuite
from .pictures import save_plot, save_sheets
from .report import Evaluation, Run
from .test_sets import TestSet, make_test_set


__all__ = [
    "METRICS",
    "Evaluation",
    "Evaluator",
    "ImageResult",
    "MetricSuite",
    "Run",
    "Sampling",
    "TestSet",
    "evaluate",
    "make_test_set",
    "save_plot",
    "save_sheets",
]
