"""What counts as a number in an argument, and as too little memory in an error."""

import math
import numbers
from typing import Any


# What PyTorch's messages of too little memory have in common, on all devices
OUT_OF_MEMORY = ("out of memory", "can't allocate memory", "not enough memory")


def is_integer(value: Any) -> bool:
    """Whether a value is an integer, of Python or NumPy, and not a boolean."""
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)


def check_positive(name: str, value: Any):
    """Raises a ValueError unless an argument is an integer of 1 or more."""
    if not is_integer(value) or value < 1:
        raise ValueError(f"`{name}` must be a positive integer, got {value!r}.")


def is_real(value: Any) -> bool:
    """Whether a value is a finite real number, of Python or NumPy, and not a boolean."""
    return isinstance(value, numbers.Real) and not isinstance(value, bool) and math.isfinite(value)


def is_auto(value: Any) -> bool:
    """Whether a value is the word `"auto"`; arrays, which compare by element, are not."""
    return isinstance(value, str) and value == "auto"
