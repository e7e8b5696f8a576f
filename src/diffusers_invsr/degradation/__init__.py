"""The Real-ESRGAN degradation from HR to LR images, for training and test sets (section 4.1 of the paper)."""

from .degradation import Degradation, DegradationSettings, EvaluationDegradationSettings


__all__ = ["Degradation", "DegradationSettings", "EvaluationDegradationSettings"]
