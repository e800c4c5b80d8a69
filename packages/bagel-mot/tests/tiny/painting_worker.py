"""One rank that paints plain captions: python painting_worker.py DEVICE WAY [WAY ...]

WAY is what `ranks.sizes_of` reads: 2/ring:2/1. The folder above must be in PYTHONPATH, for `ranks`.
"""

from __future__ import annotations

import sys

import torch
from plain_captions import paint_plain
from ranks import leaving_on_failure, sizes_of

from bagel_mot import BagelPipeline


def main(device: str, ways: list[str]) -> None:
    torch.set_num_threads(1)
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    for way in ways:
        pipeline = BagelPipeline.from_pretrained(
            "tiny", device=device, dtype=dtype, parallel=sizes_of(way)
        )
        grades = paint_plain(pipeline)
        right = sum(grade.right("things") for grade in grades)
        print(f"{way}: {right} of {len(grades)}", flush=True)


if __name__ == "__main__":
    with leaving_on_failure():
        main(sys.argv[1], sys.argv[2:])
