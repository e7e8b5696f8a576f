"""Measuring models on test sets (section 4 of the paper): sets, runs over schedules, metrics, tables, pictures."""

from .degrade import degrade_folder
from .evaluate import Sampling, evaluate
from .metrics import METRICS, MetricSuite
from .pictures import save_plot, save_sheets
from .report import Evaluation, Run


__all__ = [
    "METRICS",
    "Evaluation",
    "MetricSuite",
    "Run",
    "Sampling",
    "degrade_folder",
    "evaluate",
    "save_plot",
    "save_sheets",
]
