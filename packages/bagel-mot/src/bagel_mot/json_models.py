"""JSON files of other people's making as pydantic models, with errors that name file and key."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError


class Frozen(BaseModel):
    """Immutable; unknown keys are ignored, because the files are other people's."""

    model_config = ConfigDict(frozen=True, extra="ignore", populate_by_name=True)


ModelT = TypeVar("ModelT", bound=Frozen)


def read_json(file: Path) -> dict[str, Any]:
    """A file's JSON object.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it holds something else.
    """
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:  # bad JSON and bad UTF-8 alike
        raise ValueError(f"{file} is not valid JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{file} holds a JSON {type(content).__name__}; expected an object")
    return content


def validated(model: type[ModelT], data: Any, origin: str) -> ModelT:
    """`data` as a `model`.

    Raises:
        ValueError: naming origin, key, what was got and what would be right.
    """
    try:
        return model.model_validate(data)
    except ValidationError as error:
        problems = "; ".join(_explain(model, details) for details in error.errors())
        raise ValueError(f"{origin}: {problems}") from error


def _explain(model: type[Frozen], details: Any) -> str:
    """One pydantic error as: key, what was got, what would be right."""
    location = details["loc"]
    cause = details.get("ctx", {}).get("error")
    problem = str(cause) if cause is not None else details["msg"]
    if not location:
        return problem if cause is not None else f"got {details['input']!r}; {problem}"
    key = ".".join(str(part) for part in location)
    field = model.model_fields.get(str(location[0]))
    wanted = f"expected {field.description}" if field and field.description else "expected a value"
    if details["type"] == "missing":
        return f"key {key!r} is missing; {wanted}"
    if cause is not None:
        return f"key {key!r}: {problem}"
    return f"key {key!r} is {details['input']!r}: {problem}; {wanted}"
