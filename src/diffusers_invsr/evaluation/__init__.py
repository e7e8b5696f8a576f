"""Measuring models on test sets (section 4 of the paper): making the sets, running models over them, tables, pictures."""

from .degrade import degrade_folder


__all__ = ["degrade_folder"]
