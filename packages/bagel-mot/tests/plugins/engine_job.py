"""Runs vLLM's engine in a process of its own: `run_engine` starts it, and it runs this file.

In pytest's own process the engine would change what other tests see, and its warnings would be
errors there.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from golden_data import GOLDEN, GoldenCase
from PIL import Image

ARCHITECTURE = "MoTBagelForConditionalGeneration"
TEXT_CASES = ("c1", "c2", "d1", "d2")


@dataclass(frozen=True)
class Ask:
    """A request: texts and paths of pictures in reading order, and how many tokens to write."""

    parts: tuple[str | Path, ...]
    max_tokens: int = 16
    logits: bool = False

    @classmethod
    def of_case(cls, case: GoldenCase) -> Ask:
        """A recorded request, with logits."""
        parts = tuple(
            entry["text"] if entry["type"] == "text" else GOLDEN.folder / entry["file"]
            for entry in case.json["inputs"]
        )
        return cls(parts, case.json["params"]["max_think_token_n"], logits=True)


@dataclass(frozen=True)
class Answer:
    """What the engine wrote; `logprobs` (steps, vocabulary) if asked for."""

    token_ids: list[int]
    text: str
    logprobs: list[list[float]]


def run_engine(
    environment: Mapping[str, str],
    engine: Mapping[str, Any],
    batches: Mapping[str, Sequence[Ask]],
    folder: Path,
) -> dict[str, list[Answer]]:
    """Start an engine, by default of the golden checkpoint; it answers one batch after the other.

    Raises:
        AssertionError: with its output, if the process fails.
    """
    job, result = folder / "job.json", folder / "result.json"
    asks = {name: [asdict(ask) for ask in batch] for name, batch in batches.items()}
    job.write_text(json.dumps({"engine": dict(engine), "batches": asks}, default=str))
    done = subprocess.run(
        [sys.executable, __file__, str(job), str(result)],
        env={**environment, "PYTHONPATH": f"{environment['PYTHONPATH']}:{GOLDEN.folder.parent}"},
        capture_output=True,
        text=True,
        check=False,
        timeout=400,
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-8000:]
    answers = json.loads(result.read_text())
    return {name: [Answer(**each) for each in batch] for name, batch in answers.items()}


def _main(job_file: str, result_file: str) -> None:
    from vllm import LLM, SamplingParams

    from bagel_mot.plugins.vllm import build_prompt

    job = json.loads(Path(job_file).read_text())
    options = {
        "model": str(GOLDEN.checkpoint),
        "hf_overrides": {"architectures": [ARCHITECTURE]},
        "dtype": "float32",
        "max_model_len": 512,
        "max_logprobs": -1,
        "disable_log_stats": True,
        **job["engine"],
    }
    llm = LLM(**options)
    results = {}
    for name, asks in job["batches"].items():
        prompts = [build_prompt([_part(part) for part in ask["parts"]]) for ask in asks]
        params = [
            SamplingParams(
                temperature=0,
                max_tokens=ask["max_tokens"],
                logprobs=-1 if ask["logits"] else None,
                skip_special_tokens=False,
            )
            for ask in asks
        ]
        outputs = [request.outputs[0] for request in llm.generate(prompts, params)]
        results[name] = [
            {
                "token_ids": list(output.token_ids),
                "text": output.text,
                "logprobs": [
                    [step[token].logprob for token in sorted(step)]
                    for step in output.logprobs or ()
                ],
            }
            for output in outputs
        ]
    Path(result_file).write_text(json.dumps(results))


def _part(part: str) -> str | Image.Image:
    return Image.open(part) if part.endswith(".png") else part


if __name__ == "__main__":
    _main(*sys.argv[1:])
