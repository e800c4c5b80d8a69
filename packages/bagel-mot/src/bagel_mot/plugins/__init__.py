"""What vLLM and vLLM-Omni find through entry points; importing any of it imports neither."""

from __future__ import annotations

import logging
import os

logger = logging.getLogger("bagel_mot")


def is_on(variable: str) -> bool:
    """Whether an environment variable says yes; other words than no are a warning and a no."""
    value = os.environ.get(variable, "").strip().lower()
    if value in ("1", "true", "yes", "on"):
        return True
    if value not in ("", "0", "false", "no", "off"):
        logger.warning("%s is %r; expected 1 or 0, taken as 0", variable, value)
    return False
