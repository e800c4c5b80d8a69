"""One rank of a parallel test: paints golden cases in each of the given ways.

python parallel_worker.py CASES WAY [WAY ...]      WAY is what `ranks.sizes_of` reads: 2/ring:2/1

On GPUs everything is done twice: what is captured in CUDA graphs is then replayed from the start.
"""

from __future__ import annotations

import sys

import torch
from golden_data import GOLDEN, Judge
from golden_requests import paint_and_judge, request_parts
from ranks import leaving_on_failure, sizes_of

from bagel_mot.pipeline import BagelPipeline


def main(cases: list[str], ways: list[str], device: str) -> None:
    torch.set_num_threads(1)
    dtype, times = (torch.bfloat16, 2) if device == "cuda" else (torch.float32, 1)
    for way in ways:
        pipeline = BagelPipeline.from_pretrained(
            GOLDEN.checkpoint, device=device, dtype=dtype, parallel=sizes_of(way)
        )
        case = GOLDEN.case("c1")
        picture, question = request_parts(case)
        answers = []
        for _ in range(times):
            for name in cases:
                paint_and_judge(pipeline, Judge(dtype), GOLDEN.case(name))
            answers.append(pipeline.ask(picture, question, max_text_tokens=20))
        if device == "cuda":
            assert pipeline.workspace._graphs, "nothing was captured"
            assert answers[0] == answers[1], answers
        else:
            assert answers == [case.json["text_output"]], answers
        print("agrees:", way, flush=True)


if __name__ == "__main__":
    arguments = sys.argv[1:]
    on_gpus = "--gpus" in arguments
    names, *rest = (each for each in arguments if each != "--gpus")
    with leaving_on_failure():
        main(names.split(","), rest, "cuda" if on_gpus else "cpu")
