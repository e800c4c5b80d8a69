"""One rank that paints plain captions: python painting_worker.py DEVICE WAY [WAY ...]

WAY is TENSOR/SEQUENCE/CFG, as in `parallel_worker.py`.
"""

from __future__ import annotations

import sys

import torch
from plain_captions import paint_plain

from bagel_mot import BagelPipeline
from bagel_mot.parallel import ParallelConfig


def main(device: str, ways: list[str]) -> None:
    torch.set_num_threads(1)
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    for way in ways:
        tensor, sequence, cfg = way.split("/")
        sizes = ParallelConfig.parse(int(tensor), sequence or None, int(cfg))
        pipeline = BagelPipeline.from_pretrained("tiny", device=device, dtype=dtype, parallel=sizes)
        grades = paint_plain(pipeline)
        right = sum(grade.right("things") for grade in grades)
        print(f"{way}: {right} of {len(grades)}", flush=True)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
