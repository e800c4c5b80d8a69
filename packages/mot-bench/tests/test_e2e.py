"""`mot-bench e2e` from the command line on a tiny model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from mot_bench.model_results import E2eResults

TINY_RUN = (
    *("e2e", "--random", "tiny", "--resolution", "48x64", "--timesteps", 4, "--rounds", 2),
    *("--context-tokens", 40, "--new-tokens", 5, "--batch", "1,3"),
)


def test_all_requests(mot_bench: Any, tmp_path: Path) -> None:
    answer = mot_bench(*TINY_RUN, "--output", tmp_path)
    assert answer.code == 0, answer.err
    (path,) = tmp_path.glob("e2e-*.json")
    assert str(path) in answer.out
    results = E2eResults.read(path)
    assert results.complete
    image, edit, one, three = results.requests
    for request in (image, edit):
        assert [p.name for p in request.phases] == ["prefill", "denoise", "decode", "png"]
        assert request.steps == 3
        assert f"48x64, 4 timesteps, guidance 4 and {1 if request is image else 2}" in answer.out
    assert image.prompt_tokens == 32  # 30, start and end
    # A latent token for 16 x 16 pixels and a ViT token for 14 x 14 come before the text.
    assert edit.prompt_tokens > image.prompt_tokens + 12
    for request, batch in ((one, 1), (three, 3)):
        assert [phase.name for phase in request.phases] == ["prefill", "write"]
        assert (request.batch, request.prompt_tokens, request.steps) == (batch, 40, 5)
        assert f"batch {batch}, 40 tokens read, 5 written" in answer.out
    for request in results.requests:
        assert request.first_s > 0
        assert all(0 < phase.p20_s <= phase.median_s <= phase.p80_s for phase in request.phases)
        slack = sum(phase.p80_s for phase in request.phases)
        assert max(p.median_s for p in request.phases) < request.total.median_s <= slack * 1.01
        assert (request.memory, request.loop) == (None, None)


def test_one_request(mot_bench: Any, tmp_path: Path) -> None:
    run = ("e2e", "--random", "tiny", "--context-tokens", 40, "--new-tokens", 5, "--rounds", 2)
    answer = mot_bench(*run, "--request", "text", "--batch", 2, "--output", tmp_path)
    assert answer.code == 0, answer.err
    (path,) = tmp_path.glob("e2e-*.json")
    (request,) = E2eResults.read(path).requests
    assert (request.name, request.batch) == ("text", 2)


def test_rounds_survive_an_interruption(
    mot_bench: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mot_bench import e2e

    runs = iter(range(100))

    def interrupted(self: Any) -> dict[str, float]:
        if next(runs) == 2:  # the first is not timed
            raise KeyboardInterrupt
        return run(self)

    run = e2e.Writing.run
    monkeypatch.setattr(e2e.Writing, "run", interrupted)
    options = ("--request", "text", "--batch", 1, "--rounds", 3, "--output", tmp_path)
    answer = mot_bench("e2e", "--random", "tiny", "--context-tokens", 40, *options)
    assert answer.code == 130
    (path,) = tmp_path.glob("e2e-*.json")
    results = E2eResults.read(path)
    assert (len(results.requests), results.complete) == (1, False)


def test_a_text_that_ends_early_is_no_measurement(
    mot_bench: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mot_bench import e2e

    monkeypatch.setattr(e2e, "write_texts", lambda pipeline, contexts, tokens: 2)
    options = ("--context-tokens", 40, "--new-tokens", 5, "--batch", 1)
    answer = mot_bench("e2e", "--random", "tiny", "--request", "text", *options)
    assert answer.code == 1
    assert "1 texts of 5 tokens were asked for, but 2 tokens were written" in answer.err


def test_texts_do_not_end_at_the_end_token() -> None:
    """Whatever the model says, `write_texts` goes on to the last token."""
    import torch
    from bagel_mot.synthetic import TINY, random_pipeline

    from mot_bench.bagel import read_texts, write_texts

    pipeline = random_pipeline(TINY, device=torch.device("cpu"), dtype=torch.float32)
    model, eos = pipeline.model, pipeline.tokenizer.eos
    certain = torch.zeros(1, TINY.llm.vocab_size)
    certain[0, eos] = 1
    model.logits = lambda hidden: certain.expand(len(hidden), -1)
    assert write_texts(pipeline, read_texts(pipeline, ["a", "red fox"]), 7) == 14
    assert pipeline.tokenizer.eos == eos


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--resolution", "48x64,64x64"), "--resolution is '48x64,64x64'; expected one"),
        (("--resolution", "2048x64"), "--resolution is '2048x64': height is 2048"),
        (("--request", "video"), "--request is 'video'; expected one of image, edit, text"),
        (("--batch", "0"), "--batch is '0'; expected whole numbers of at least 1"),
        (("--request", "text"), "--resolution is for image and edit, which --request leaves out"),
        (("--request", "edit"), "--batch is for text, which --request leaves out"),
    ],
    ids=lambda value: "_".join(value) if isinstance(value, tuple) else "",
)
def test_bad_arguments(arguments: tuple[str, ...], message: str, mot_bench: Any) -> None:
    answer = mot_bench(*TINY_RUN, *arguments)
    assert answer.code == 2
    assert message in answer.err
    assert answer.out == ""


@pytest.mark.parametrize("option", ["--context-tokens", "--new-tokens", "--prompt-tokens"])
def test_absurd_numbers_of_tokens_are_refused(mot_bench: Any, option: str) -> None:
    answer = mot_bench("e2e", "--random", "tiny", option, 999_999_999)
    assert answer.code == 2
    assert option in answer.err and "1048576" in answer.err
