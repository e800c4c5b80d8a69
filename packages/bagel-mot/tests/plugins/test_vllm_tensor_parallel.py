"""The same engine on two ranks."""

from __future__ import annotations

from pathlib import Path

import pytest
from engine_job import TEXT_CASES, Ask, run_engine
from golden_data import GOLDEN


@pytest.mark.engine
def test_two_ranks(plugin_env: dict[str, str], tmp_path: Path) -> None:
    """Tensor parallel, without compilation: the official model's tokens, alone and at once."""
    cases = [GOLDEN.case(name) for name in TEXT_CASES]
    asks = [Ask.of_case(case) for case in cases]
    batches = {"together": asks} | dict(zip(TEXT_CASES, ([ask] for ask in asks), strict=True))
    engine = {"tensor_parallel_size": 2, "enforce_eager": True, "max_num_batched_tokens": 64}
    answers = run_engine(plugin_env, engine, batches, tmp_path)
    want = [case.tensors["text0.next_token_ids"].tolist() for case in cases]
    assert [answers[name][0].token_ids for name in TEXT_CASES] == want
    assert [answer.token_ids for answer in answers["together"]] == want
