"""The two ways a command fails, each with its exit code."""

from __future__ import annotations


class UsageError(Exception):
    """An option is wrong (exit code 2). One line: the option, its value, what is right."""


class MeasurementError(Exception):
    """Measuring went wrong (exit code 1). One line: what happened and what to do."""
