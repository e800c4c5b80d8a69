"""One tensor parallel rank of a quantised model: python quantized_worker.py RANKS FILE FORMAT...

FILE holds what one rank gives for each format, and how near this must come: see
`test_quantized_model.test_ranks_agree`.
"""

from __future__ import annotations

import sys

import torch
from golden_data import relative_error
from quantized_models import load, results
from ranks import leaving_on_failure

from bagel_mot.parallel import ParallelConfig
from bagel_mot.quantization import Quantization


def main(ranks: int, file: str, words: list[str]) -> None:
    torch.set_num_threads(1)
    wanted = torch.load(file)
    for word in words:
        quantization = Quantization.parse(*word.split("/"))
        got = results(load(quantization=quantization, parallel=ParallelConfig(tensor=ranks)))
        tensors, bound = wanted[word]
        for mine, want in zip((*got.velocities, got.logits), tensors, strict=True):
            error = relative_error(mine, want)
            assert error <= bound, f"{word}: {error:.2e} > {bound:.1e}"
        print("agrees:", word, flush=True)


if __name__ == "__main__":
    with leaving_on_failure():
        main(int(sys.argv[1]), sys.argv[2], sys.argv[3:])
