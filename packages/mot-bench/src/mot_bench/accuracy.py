"""`mot-bench accuracy`: how far number formats and attention backends move what a model computes.

Each variant is the same model, loaded anew, and computes the same things: the velocities of the
first denoising step (the gen expert's work) and the logits that follow the prompt (the und
expert's). The first variant is what the others are compared with.
"""

from __future__ import annotations

import dataclasses
import gc
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from bagel_mot.pipeline import BagelPipeline
from bagel_mot.text import TextJob, generate_texts

from mot_bench.bagel import Choice, denoising, image_job, load, read_texts, subject
from mot_bench.environment import environment
from mot_bench.errors import MeasurementError, UsageError
from mot_bench.model_results import SCHEMA, AccuracyResults, Distance, VariantResult


@dataclass(frozen=True)
class Computed:
    """What one variant computed, in float64 on the CPU.

    Attributes:
        velocities: (N, C) of each branch, all pictures' rows.
        guided: (N, C), what guidance makes of them.
        logits: (vocabulary,) of the token after the prompt.
    """

    velocities: tuple[torch.Tensor, ...]
    guided: torch.Tensor
    logits: torch.Tensor


def run_accuracy(
    variants: Sequence[Choice],
    device: torch.device,
    *,
    size: tuple[int, int],
    branches: int,
    batch: int,
    prompt: str,
    command: str,
    say: Callable[[str], None] = lambda line: None,
    on_variant: Callable[[AccuracyResults], None] = lambda results: None,
) -> AccuracyResults:
    """Compute with each variant and compare.

    Args:
        variants: see `mot_bench.bagel.variants`.
        device: where to.
        size: (height, width) of the picture, in pixels.
        branches: contexts that guide it, 1 to 3.
        batch: pictures, which begin with different noise.
        prompt: what they are of.
        command: kept in the results.
        say: called with a line before each variant.
        on_variant: called after each one with the results so far.

    Raises:
        UsageError: a variant cannot be loaded, or the checkpoint is quantised already.
        MeasurementError: what a variant computes is not finite.
    """
    first = variants[0]
    computed: dict[Choice, Computed] = {}
    found: list[VariantResult] = []
    conditions = environment(device)
    for number, choice in enumerate(variants, start=1):
        attention = "" if choice.attention is None else f", attention {choice.attention}"
        say(f"{number} of {len(variants)}: {choice.weights}{attention}")
        pipeline = load(choice, device)
        facts = subject(choice, pipeline)
        if choice is first:
            if facts.quantization != "none":
                raise UsageError(
                    f"--model is {str(choice.folder)!r}, which is quantized; give the checkpoint "
                    "it was made from"
                )
            reference = facts
        own = computed[choice] = compute(pipeline, size, branches, batch, prompt)
        del pipeline  # two variants' weights need not fit into memory together
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
        truth = computed[first]
        same = computed[dataclasses.replace(choice, attention=first.attention)]
        found.append(
            VariantResult(
                weights=facts.quantization,
                attention=facts.attention,
                bytes=facts.bytes,
                velocities=tuple(map(distance, own.velocities, truth.velocities)),
                guided=distance(own.guided, truth.guided),
                logits=distance(own.logits, truth.logits),
                attention_alone=distance(torch.cat(own.velocities), torch.cat(same.velocities)),
            )
        )
        results = AccuracyResults(
            schema=SCHEMA,
            kind=AccuracyResults.KIND,
            command=command,
            environment=conditions,
            subject=reference,
            protocol="velocities of the first step and logits after the prompt, each variant's "
            "against the first one's; reckoned in float64",
            complete=len(found) == len(variants),
            height=size[0],
            width=size[1],
            branches=branches,
            batch=batch,
            prompt=prompt,
            variants=tuple(found),
        )
        on_variant(results)
    return results


@torch.no_grad()
def compute(
    pipeline: BagelPipeline, size: tuple[int, int], branches: int, batch: int, prompt: str
) -> Computed:
    """One step and one token.

    Raises:
        MeasurementError: a number is not finite.
    """
    jobs = [
        image_job(pipeline, size, branches=branches, prompt=prompt, steps=1, seed=seed)
        for seed in range(batch)
    ]
    steps = denoising(pipeline, jobs).step()
    velocities = tuple(map(_joined, zip(*(step.velocities for step in steps), strict=True)))
    guided = _joined([step.velocity for step in steps])
    logits: list[torch.Tensor] = []
    (context,) = read_texts(pipeline, [prompt])
    text = TextJob(context, max_tokens=1, on_logits=lambda each: logits.append(each.double().cpu()))
    generate_texts(pipeline.model, pipeline.tokenizer, [text], workspace=pipeline.workspace)
    if not all(each.isfinite().all() for each in (*velocities, guided, *logits)):
        raise MeasurementError("the model's velocities or logits are not finite")
    return Computed(velocities, guided, logits[0].flatten())


def _joined(rows: Sequence[torch.Tensor]) -> torch.Tensor:
    return torch.cat(list(rows)).double().cpu()


def distance(own: torch.Tensor, truth: torch.Tensor) -> Distance:
    """How far one result is from another."""
    cosine = torch.cosine_similarity(own.flatten(), truth.flatten(), dim=0)
    return Distance(float(cosine), float((own - truth).norm() / truth.norm()))
