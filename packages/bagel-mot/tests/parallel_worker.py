"""One rank of a parallel test: paints golden cases in each of the given ways.

python parallel_worker.py CASES WAY [WAY ...]      WAY is TENSOR/SEQUENCE/CFG, e.g. 2/ring:2/1
"""

from __future__ import annotations

import sys

import torch
from golden_data import GOLDEN, Judge
from golden_requests import paint_and_judge, request_parts

from bagel_mot.parallel import ParallelConfig
from bagel_mot.pipeline import BagelPipeline


def main(cases: list[str], ways: list[str]) -> None:
    torch.set_num_threads(1)
    for way in ways:
        tensor, sequence, cfg = way.split("/")
        sizes = ParallelConfig.parse(int(tensor), sequence or None, int(cfg))
        pipeline = BagelPipeline.from_pretrained(
            GOLDEN.checkpoint, device="cpu", dtype="float32", parallel=sizes
        )
        for name in cases:
            paint_and_judge(pipeline, Judge(torch.float32), GOLDEN.case(name))
        case = GOLDEN.case("c1")
        picture, question = request_parts(case)
        answer = pipeline.ask(picture, question, max_text_tokens=20)
        assert answer == case.json["text_output"], answer
        print("agrees:", way, flush=True)


if __name__ == "__main__":
    main(sys.argv[1].split(","), sys.argv[2:])
