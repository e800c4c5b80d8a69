"""What went wrong with one request."""

from __future__ import annotations


class Failure(Exception):
    """One request failed; the others go on.

    Attributes:
        kind: what the summary counts it under: "http 500" (any status but 2xx), "connection"
            (refused, dropped, cut short), "timeout", "answer" (not what the endpoint answers),
            "stream" (an error in it, or no end) or "broken image".
    """

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message)
        self.kind = kind


def excerpt(text: str, most: int = 200) -> str:
    """The beginning of a text, on one line. JSON may hold halves of surrogate pairs: they are ?."""
    line = " ".join(text.split()).encode(errors="replace").decode()
    return line if len(line) <= most else f"{line[:most]}..."
