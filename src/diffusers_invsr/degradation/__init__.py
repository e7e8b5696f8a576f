"""The Real-ESRGAN degradation: LR images of HR ones, for training and for test sets (section 4.1 of the paper)."""

from .degradation import Degradation, DegradationSettings, EvaluationDegradationSettings


__all__ = ["Degradation", "DegradationSettings", "EvaluationDegradationSettings"]
