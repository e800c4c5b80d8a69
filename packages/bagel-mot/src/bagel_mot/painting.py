"""What `generate` and `edit` share: requests, of which all is checked, are painted and saved."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import typer

from bagel_mot import __version__
from bagel_mot.cli_io import (
    IS_FIRST_RANK,
    Streamed,
    console,
    output_files,
    progress,
    save_png,
    user_errors,
)
from bagel_mot.files import naming
from bagel_mot.model_options import Place

if TYPE_CHECKING:
    from bagel_mot.pipeline import BagelPipeline
    from bagel_mot.reading import Prepared
    from bagel_mot.request import Request, Result

# Images of requests that are read, thought about and painted together: a few fill the largest GPU.
_TOGETHER = 16


@dataclass(frozen=True)
class Painting:
    """Requests for images, the model that is to paint them and the files they will be in."""

    pipeline: BagelPipeline
    requests: Sequence[Request]
    files: Sequence[Path]
    overwrite: bool

    @classmethod
    def ready(
        cls,
        requests: Sequence[Request],
        output: Path,
        overwrite: bool,
        place: Place,
        *,
        numbered: bool = False,
    ) -> Self:
        """Check the files and load the model; with --nproc, this process ends here.

        Raises:
            ValueError, OSError: what the user can mend.
        """
        count = sum(request.num_images for request in requests)
        files = output_files(output, count, overwrite, numbered=numbered)
        place.start_ranks()
        return cls(place.load(), requests, files, overwrite)

    def paint(self) -> None:
        """Paint and save, so many requests at a time: what is saved stays, whatever comes."""
        files = iter(self.files)
        steps = sum(map(_steps, self.requests))
        if len(self.requests) == 1:
            # The thought is shown while it is written.
            thought = Streamed(err=True)
            prepared = self.pipeline.prepare(self.requests[0], on_text=thought)
            if prepared.text is not None:
                thought.finish(prepared.text)
            with progress("painting", steps) as advance:
                self._paint_one(self.requests[0], prepared, advance, files)
            return
        with progress("painting", steps) as advance:
            for together in _groups(self.requests):
                if len(together) == 1:
                    prepared = self.pipeline.prepare(together[0])
                    _tell(prepared.text)
                    self._paint_one(together[0], prepared, advance, files)
                    continue
                results = self.pipeline.run(together, on_step=lambda _: advance(1))
                for result in results:
                    _tell(result.text)
                self._save(together, results, files)

    def _paint_one(
        self,
        request: Request,
        prepared: Prepared,
        advance: Callable[[int], None],
        files: Iterator[Path],
    ) -> None:
        for start in range(0, len(prepared.jobs), _TOGETHER):
            part = replace(prepared, jobs=prepared.jobs[start : start + _TOGETHER])
            self.pipeline.denoise(part.jobs, on_step=lambda _: advance(1))
            self._save([request], [self.pipeline.finish(part)], files, first=start)

    def _save(
        self,
        requests: Sequence[Request],
        results: Sequence[Result],
        files: Iterator[Path],
        *,
        first: int = 0,
    ) -> None:
        """`first` is the number of the results' first image among its request's."""
        if not IS_FIRST_RANK:
            return
        with user_errors():
            saved = [
                save_png(
                    image, next(files), _metadata(request, result, i), overwrite=self.overwrite
                )
                for request, result in zip(requests, results, strict=True)
                for i, image in enumerate(result.images, first)
            ]
            with naming("the standard output"):
                for file in saved:  # nobody may be listening any more
                    typer.echo(file.resolve())


def _groups(requests: Sequence[Request]) -> Iterator[list[Request]]:
    """As many as have `_TOGETHER` images, or one that has more."""
    group: list[Request] = []
    for request in requests:
        if group and sum(each.num_images for each in (*group, request)) > _TOGETHER:
            yield group
            group = []
        group.append(request)
    yield group


def _tell(thought: str | None) -> None:
    if thought is not None and IS_FIRST_RANK:
        console.print(thought, markup=False, highlight=False, soft_wrap=True)


def _steps(request: Request) -> int:
    return (request.settings.num_timesteps - 1) * request.num_images


def _metadata(request: Request, result: Result, i: int) -> dict[str, Any]:
    """What image i is to tell, so that it can be painted again."""
    thought, count = result.text, request.num_images
    # They share what was drawn for the first one before its own noise: pictures, a thought.
    is_shared = count > 1 and (len(request.parts) > 1 or thought is not None)
    found = {
        "prompt": request.parts[-1],
        "seed": str(result.seeds[0 if is_shared else i]),
        "settings": request.settings.model_dump_json(),
        "software": f"bagel-mot {__version__}",
    }
    if is_shared:
        found["num_images"] = f"{count}, of which this is number {i}"
    if request.negative_prompt is not None:
        found["negative_prompt"] = request.negative_prompt
    if thought is not None:
        found["thought"] = thought
        found["max_text_tokens"] = str(request.max_text_tokens)
        if request.temperature is not None:
            found["temperature"] = str(request.temperature)
    return found
