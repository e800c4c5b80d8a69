"""Which model runs where: the options that every command with a model has, and loading it."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from bagel_mot.cli_io import find_model, progress, require_folder

if TYPE_CHECKING:
    from bagel_mot.config import BagelConfig


def _check_keep(words: str) -> str:
    """A callback of --keep-bf16: its words are known."""
    if words:
        from bagel_mot.quantization import Keep

        try:
            Keep.parse(words)
        except ValueError as error:
            raise typer.BadParameter(str(error)) from error
    return words


ModelOption = Annotated[
    Path,
    typer.Option(
        "--model",
        "-m",
        callback=find_model,
        help="Checkpoint folder in the official layout, or tiny: the model shipped with us.",
    ),
]
OutArgument = Annotated[
    Path, typer.Argument(metavar="OUT", help="Folder to write; must not exist.")
]
DeviceOption = Annotated[
    str | None,
    typer.Option(help="Where to run, e.g. cuda:0 or cpu. Default: a GPU if there is one."),
]
DtypeOption = Annotated[
    str | None,
    typer.Option(help="bfloat16, float16 or float32. Default: bfloat16, on a CPU float32."),
]
AttentionOption = Annotated[
    str | None,
    typer.Option(
        help="Attention: fa3, fa3-fp8 (8 bits), fa2, cudnn, sdpa or math. Default: the fastest "
        "that does not round; see inspect."
    ),
]
GraphsOption = Annotated[
    bool,
    typer.Option("--cuda-graphs/--no-cuda-graphs", help="On a GPU, launch each step as one."),
]
QuantizationOption = Annotated[
    str | None,
    typer.Option(help="Quantise while loading: fp8, int8, w8a16, w4a16 (or w4a16:32, w4a16:64)."),
]
KeepOption = Annotated[
    str,
    typer.Option(
        "--keep-bf16",
        "--keep",
        callback=_check_keep,
        help="What not to quantise: first, last (layers; last:2), qkv_proj, o_proj, gate_up_proj, "
        "down_proj, with commas between. Default: nothing.",
    ),
]
TpOption = Annotated[int, typer.Option(help="Tensor parallel ranks.")]
SpOption = Annotated[
    str | None,
    typer.Option(help="Sequence parallel ranks: ulysses:2, ring:3, ulysses:2,ring:2, allgather:2."),
]
CfgParallelOption = Annotated[int, typer.Option(help="Ranks the guidance is spread over.")]
NprocOption = Annotated[
    int | None, typer.Option(help="Start this many ranks here (else: torchrun does).")
]


def check_nproc(nproc: int | None) -> None:
    """Refuse a --nproc that is no number of ranks."""
    if nproc is not None and nproc < 1:
        raise ValueError(f"--nproc {nproc}: expected at least 1")


def run_on_ranks(nproc: int | None) -> None:
    """With --nproc: run this command on so many ranks instead, and exit as they do."""
    from bagel_mot.launch import run_ranks

    if nproc is None or nproc == 1:
        return
    for word in sys.argv[1:]:
        if os.path.exists(word) and not (os.path.isfile(word) or os.path.isdir(word)):
            raise ValueError(
                f"{word} can be read once, but every rank of --nproc reads; give a file"
            )
    words = iter(sys.argv[1:])
    command = [sys.executable, "-m", "bagel_mot"]
    for word in words:
        if word == "--nproc":
            next(words)
        elif not word.startswith("--nproc="):
            command.append(word)
    raise typer.Exit(run_ranks(command, nproc))


@dataclass(frozen=True)
class Place:
    """Which model runs where, and in what."""

    model: Path
    device: str | None
    dtype: str | None
    attention: str | None
    quantization: str | None
    keep_bf16: str
    cuda_graphs: bool
    tp: int
    sp: str | None
    cfg_parallel: int
    nproc: int | None

    def config(self) -> BagelConfig:
        """The model's sizes; its weights stay unread.

        Raises:
            FileNotFoundError: there is no such folder, or a file of it is missing.
            ValueError: a file does not hold what it should.
        """
        from bagel_mot.checkpoint import config_with_grids, read_headers
        from bagel_mot.config import BagelConfig

        require_folder(self.model)
        config = BagelConfig.from_folder(self.model)
        return config_with_grids(config, read_headers(self.model))

    def start_ranks(self) -> None:
        """With --nproc: run this command on so many ranks instead, and exit as they do."""
        from bagel_mot.parallel import ParallelConfig, world_size_from_environment

        llm = self.config().llm
        check_nproc(self.nproc)
        sizes = ParallelConfig.parse(self.tp, self.sp, self.cfg_parallel)
        ranks = self.nproc or world_size_from_environment()
        sizes.check(llm, ranks)
        if (quantization := self._quantization()) is not None:
            quantization.formats(llm).check(llm, self.tp)
        run_on_ranks(self.nproc)

    def load(self) -> Any:
        """The pipeline."""
        from bagel_mot import checkpoint
        from bagel_mot.loading import usual_dtype
        from bagel_mot.parallel import ParallelConfig
        from bagel_mot.pipeline import BagelPipeline

        headers = checkpoint.read_headers(self.model)
        total = sum(tensor.elements for tensor in headers.values())
        with progress("loading", total, numbers=False) as advance:
            return BagelPipeline.from_pretrained(
                self.model,
                device=self.device,
                dtype=self.dtype or usual_dtype(self.device),
                attention=self.attention,
                quantization=self._quantization(),
                cuda_graphs=self.cuda_graphs,
                parallel=ParallelConfig.parse(self.tp, self.sp, self.cfg_parallel),
                on_tensor=lambda _, elements: advance(elements),
            )

    def _quantization(self) -> Any:
        from bagel_mot.quantization import Quantization

        if self.quantization is not None:
            return Quantization.parse(self.quantization, self.keep_bf16)
        if self.keep_bf16:
            raise ValueError(
                f"--keep-bf16 {self.keep_bf16}: nothing is quantised; give --quantization too"
            )
        return None
