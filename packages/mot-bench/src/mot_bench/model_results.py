"""What `mot-bench step` and `mot-bench e2e` found, as data; written to JSON. No torch here.

As in `mot_bench.results`, only what was measured is stored, and rates are computed by readers.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Self

from mot_bench.files import write_json
from mot_bench.results import Ceilings, Environment, Timing, read_json, run_file

SCHEMA = 1


@dataclass(frozen=True)
class Subject:
    """The model that was measured.

    Attributes:
        weights: the checkpoint folder, or "random" and the size.
        parameters: their number as learned, whatever the format and the ranks.
        bytes: of all that this rank holds of them, scales included.
        dtype: what the model computes in.
        attention: the backend that ran; "default" in files from before it was recorded.
        cuda_graphs: "on" if steps are captured, else "off"; "default" as above.
        bagel_mot, vllm: versions.
        quantization: format of the decoder layers' weights; "as in the checkpoint" if they came in
            one; or "none".
        loading: peak of the GPU's memory in tensors until the model was there, in bytes.
    """

    weights: str
    parameters: int
    bytes: int
    dtype: str
    attention: str
    cuda_graphs: str
    bagel_mot: str
    vllm: str
    quantization: str = "none"
    loading: int | None = None


@dataclass(frozen=True)
class Memory:
    """Peaks of the GPU's memory, in bytes, the weights included.

    Attributes:
        allocated: in tensors. What lives inside a CUDA graph while it replays is not counted.
        reserved: taken from the device by torch, graphs and gaps included.
    """

    allocated: int
    reserved: int


@dataclass(frozen=True)
class KernelTime:
    """One GPU kernel of a step or loop: its name, runs and microseconds in all."""

    name: str
    runs: float
    us: float


@dataclass(frozen=True)
class Activity:
    """What a profiler saw on the GPU; per step where it says so.

    Attributes:
        kernels: kernels per step, copies and memory sets included.
        launches: calls from the host that start GPU work, per step; a CUDA graph is one.
        gpu_us: time in which the GPU did something, per step.
        span_us: from the first to the last of it, per step.
        exchange_us: in kernels that exchange data with other GPUs, per step.
        longest: the kernels that took the most time, per step, the longest first.
    """

    kernels: float
    launches: float
    gpu_us: float
    span_us: float
    exchange_us: float
    longest: tuple[KernelTime, ...]

    @property
    def busy(self) -> float:
        """Share of the span in which the GPU did something. The profiler slows the host, so
        without it the share is rather larger."""
        return self.gpu_us / self.span_us if self.span_us else 0.0


@dataclass(frozen=True)
class AttentionRate:
    """What an attention backend reaches on one image's rows and no mask.

    Attributes:
        name: of the backend.
        tflops: 1e12 operations per second; None if it cannot run here.
        why: then the reason, or empty.
    """

    name: str
    tflops: float | None
    why: str


@dataclass(frozen=True)
class Work:
    """The work of one step that no implementation can avoid.

    Attributes:
        gemm_flops: of the transformer's linears, all rows through one dense layer.
        attention_flops: of scores and values.
        bytes_moved: activations that norms, RoPE, activation and residuals read and write once.
    """

    gemm_flops: float
    attention_flops: float
    bytes_moved: float


@dataclass(frozen=True)
class StepProvider:
    """One implementation of one step.

    Attributes:
        name: "mot" is ours.
        baseline: whether others are compared to it.
        timing: of one step.
        memory: None on a CPU.
        activity: None on a CPU.
        difference: of its velocities to the first provider's, relative L2.
    """

    name: str
    baseline: bool
    timing: Timing
    memory: Memory | None
    activity: Activity | None
    difference: float


@dataclass(frozen=True)
class StepCase:
    """One step at one size.

    Attributes:
        height, width: of the images, in pixels.
        branches: contexts per image.
        batch: images.
        rows: packed rows of the step.
        prompt_tokens: of the text, without its start and end tokens.
        work: see `Work`.
        providers: in the order they were asked for.
    """

    height: int
    width: int
    branches: int
    batch: int
    rows: int
    prompt_tokens: int
    work: Work
    providers: tuple[StepProvider, ...]


@dataclass(frozen=True)
class Run:
    """What all result files begin with: see `mot_bench.results.Results`."""

    schema: int
    kind: str
    command: str
    environment: Environment
    subject: Subject
    protocol: str
    complete: bool

    KIND: ClassVar[str]

    def write(self, path: Path) -> None:
        """Write as JSON."""
        write_json(path, dataclasses.asdict(self))

    @classmethod
    def read(cls, path: Path) -> Self:
        """Read what `write` wrote.

        Raises:
            ValueError: not such a file; the message names the file and the key.
            OSError: it cannot be read.
        """
        results: Self = read_json(cls, path, cls.KIND, SCHEMA)
        return results

    def file_name(self) -> str:
        """A file name that no other run has."""
        return run_file(self.kind, self.environment)


@dataclass(frozen=True)
class StepResults(Run):
    """A run of `mot-bench step`.

    Attributes:
        ceilings: of matmul and copy, in this run.
        attention: what each attention backend reached in this run.
        cases: in the order they ran.
    """

    ceilings: Ceilings
    attention: tuple[AttentionRate, ...]
    cases: tuple[StepCase, ...]

    KIND = "step"

    def floor_us(self, work: Work) -> float:
        """The time that a step's work takes at the ceilings, one thing after the other."""
        rates = [rate.tflops for rate in self.attention if rate.tflops]
        attention = work.attention_flops / max(rates) / 1e6 if rates else 0.0
        gemm = work.gemm_flops / self.ceilings.matmul_tflops / 1e6
        return gemm + attention + work.bytes_moved / self.ceilings.copy_gbps / 1e3


@dataclass(frozen=True)
class Phase:
    """One part of a request, in seconds: median and 20th and 80th percentile of the rounds."""

    name: str
    median_s: float
    p20_s: float
    p80_s: float


@dataclass(frozen=True)
class RequestResult:
    """One kind of request, from prompt to answer.

    Attributes:
        name: of the request.
        what: its settings in words.
        batch: requests at a time.
        steps: denoising steps, or tokens written for each request.
        prompt_tokens: rows of the context that the answer begins from.
        first_s: seconds of the first, untimed, run: compilation and graph captures are in it.
        phases: its parts, in order; their sum is the whole.
        total: the whole.
        memory: None on a CPU.
        loop: the profiled denoising loop; None on a CPU and for texts.
    """

    name: str
    what: str
    batch: int
    steps: int
    prompt_tokens: int
    first_s: float
    phases: tuple[Phase, ...]
    total: Phase
    memory: Memory | None
    loop: Activity | None


@dataclass(frozen=True)
class E2eResults(Run):
    """A run of `mot-bench e2e`."""

    requests: tuple[RequestResult, ...]

    KIND = "e2e"


@dataclass(frozen=True)
class Distance:
    """Between what was computed and what it is compared with, all numbers in one vector.

    Attributes:
        cosine: of the angle between them.
        relative: L2 norm of the difference, relative to what it is compared with.
    """

    cosine: float
    relative: float


@dataclass(frozen=True)
class VariantResult:
    """What one variant of a model computes, against the first variant.

    Attributes:
        weights: format of the decoder layers' weights and what of them is kept, or "none".
        attention: the backend.
        bytes: of all parameters, scales included.
        velocities: of each branch, all pictures' in one vector.
        guided: of the velocity that guidance makes of them.
        logits: of the token after the prompt.
        attention_alone: velocities of all branches, against the same weights with the first
            backend.
    """

    weights: str
    attention: str
    bytes: int
    velocities: tuple[Distance, ...]
    guided: Distance
    logits: Distance
    attention_alone: Distance


@dataclass(frozen=True)
class AccuracyResults(Run):
    """A run of `mot-bench accuracy`; its subject is the first variant.

    Attributes:
        height, width: of the picture, in pixels.
        branches: contexts that guide it.
        batch: pictures.
        prompt: what they are of.
        variants: in the order they ran.
    """

    height: int
    width: int
    branches: int
    batch: int
    prompt: str
    variants: tuple[VariantResult, ...]

    KIND = "accuracy"
