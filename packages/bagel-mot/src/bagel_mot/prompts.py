"""Many prompts in a file, one JSON object a line: what `generate --prompts` reads."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError


class PromptLine(BaseModel):
    """A line of the file; what it leaves out is as on the command line."""

    model_config = ConfigDict(extra="forbid", strict=True)

    prompt: str
    height: int | None = None
    width: int | None = None
    seed: int | None = None
    negative_prompt: str | None = None


def read_prompts(file: Path, make: Callable[..., Any]) -> list[Any]:
    """What `make` makes of each line; empty lines are passed over.

    Args:
        file: of one JSON object a line, with the keys of `PromptLine`.
        make: called with a line's prompt, and by keyword with what else it gives.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a line is not as expected, or `make` refuses it; the message has its number.
            Or there is none.
    """
    try:
        lines = file.read_text(encoding="utf-8-sig").split("\n")
    except FileNotFoundError as error:
        raise FileNotFoundError(f"--prompts {file}: no such file") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"--prompts {file}: not UTF-8 ({error})") from error
    except OSError as error:
        raise OSError(f"--prompts {file}: {error.strerror}") from error
    made: list[Any] = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            given = PromptLine.model_validate_json(line).model_dump(exclude_none=True)
            made.append(make(given.pop("prompt"), **given))
        except ValidationError as error:
            raise ValueError(f"--prompts {file}, line {number}: {_first_of(error)}") from error
        except ValueError as error:
            raise ValueError(f"--prompts {file}, line {number}: {error}") from error
    if not made:
        raise ValueError(f"--prompts {file}: no prompts; expected one JSON object a line")
    return made


def _first_of(error: ValidationError) -> str:
    """The first thing that is wrong."""
    problem = error.errors()[0]
    name = ".".join(map(str, problem["loc"]))
    if problem["type"] == "extra_forbidden":
        return f"unknown key {name!r}; expected {', '.join(PromptLine.model_fields)}"
    return f"{name}: {problem['msg']}" if name else problem["msg"]
