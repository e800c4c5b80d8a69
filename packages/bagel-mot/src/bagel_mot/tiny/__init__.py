"""A small BAGEL that paints coloured shapes: its world, its grader, its training, its weights."""

from __future__ import annotations

import logging
import os
from pathlib import Path

logger = logging.getLogger(__name__)

NAME = "tiny"
FOLDER = Path(__file__).parent / "checkpoint"


def model_folder(model: str | os.PathLike[str]) -> Path:
    """The checkpoint folder that a user means: a path, or "tiny" for the one shipped with us.

    A folder of one's own that is called tiny needs its whole path.

    Raises:
        FileNotFoundError: "tiny", but this installation has no weights for it.
    """
    if os.fspath(model) != NAME:
        return Path(model)
    if Path(NAME, "llm_config.json").is_file():
        logger.warning("tiny is the model that is shipped; the folder here needs its whole path")
    if not (FOLDER / "ema.safetensors").is_file():
        raise FileNotFoundError(
            f"the tiny model is not part of this installation ({FOLDER} holds no weights); train "
            "it with `bagel-mot train-tiny RUN` and give RUN/checkpoint as the model"
        )
    return FOLDER
