"""Numbers that callers give: whole ones, and any that are to be floats."""

from __future__ import annotations

import math
from numbers import Integral, Real


def check_whole(name: str, value: object) -> None:
    """Refuse what is no whole number; NumPy's are.

    Raises:
        TypeError: naming `name`.
    """
    if not isinstance(value, Integral) or isinstance(value, bool):
        raise TypeError(f"{name} is {value!r}; expected a whole number")


def to_float(name: str, value: object) -> float:
    """A real number as a float; NaN if it is too large for one.

    Raises:
        TypeError: it is none, naming `name`.
    """
    if not isinstance(value, Real) or isinstance(value, bool):
        raise TypeError(f"{name} is {value!r}; expected a number")
    try:
        return float(value)
    except OverflowError:
        return math.nan
