"""One of two CFG parallel ranks that feign CUDA graphs: when do they capture, replay and launch?

Prints "together" if both did the same at every call, and painted what they paint without.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from ranks import leaving_on_failure

from bagel_mot.graphs import Call, Workspace
from bagel_mot.parallel import ParallelConfig
from bagel_mot.request import Request
from bagel_mot.sampling import ImageSettings
from bagel_mot.synthetic import TINY, random_pipeline

# (side, words, image scale). A long text is on rank 0 alone, as is the third context, of guidance
# by the image: what rank 0 has outgrown, rank 1 alone would still have room for.
REQUESTS = [(64, 1, 1.0), (48, 40, 1.0), (64, 1, 1.0), (48, 1, 2.0), (64, 1, 1.0), (48, 40, 1.0)]


class FeignedGraph:
    """Replays by computing the same again, into the same tensors."""

    def __init__(self, body: Callable[[], Any], results: Any, events: list[str]) -> None:
        self._body, self._results, self._events = body, results, events

    def replay(self) -> None:
        self._events.append("replay")
        for old, new in zip(self._results, self._body(), strict=True):
            if old is not None:
                old.used.copy_(new.used)


def main() -> None:
    torch.set_num_threads(1)
    device = torch.device("cpu")
    pipeline = random_pipeline(
        TINY, device=device, dtype=torch.float32, parallel=ParallelConfig(cfg=2)
    )
    events: list[str] = []

    def record(workspace: Workspace, body: Callable[[], Any]) -> tuple[Any, Any]:
        # What a capture holds is not computed: x must be as it was before.
        events.append("capture")
        (runner,) = (body.__closure__ or ())[1:]
        kept = runner.cell_contents.x.clone()
        results = body()
        runner.cell_contents.x.copy_(kept)
        return FeignedGraph(body, results, events), results

    def called(call: Call[Any]) -> Any:
        events.append("call")
        return original(call)

    original, Call.__call__ = Call.__call__, called  # type: ignore[method-assign]
    painted: list[list[torch.Tensor]] = [[], []]
    for i, capture in enumerate((False, True)):
        pipeline.workspace = Workspace(pipeline.model)
        pipeline.workspace.capture = capture
        Workspace._record = record  # type: ignore[method-assign, assignment]
        for side, words, image_scale in REQUESTS:
            settings = ImageSettings(
                num_timesteps=5,
                cfg_text_scale=4.0,
                cfg_img_scale=image_scale,
                cfg_interval=(0.0, 1.0),
            )
            picture = [] if image_scale == 1.0 else [_picture()]
            request = Request(
                [*picture, "fox " * words],
                "image",
                height=side,
                width=side,
                settings=settings,
                seed=1,
            )
            prepared = pipeline.prepare(request)
            pipeline.denoise(prepared.jobs)
            painted[i].append(prepared.jobs[0].latents.clone())
    for plain, captured in zip(*painted, strict=True):
        torch.testing.assert_close(captured, plain)
    everyone: list[Any] = [None, None]
    dist.all_gather_object(everyone, events)
    assert everyone[0] == everyone[1], everyone
    assert {"capture", "replay"} <= set(events), events
    if dist.get_rank() == 0:
        print("together", events.count("capture"), flush=True)


def _picture() -> Any:
    from PIL import Image

    return Image.new("RGB", (48, 48), "red")


if __name__ == "__main__":
    with leaving_on_failure():
        main()
