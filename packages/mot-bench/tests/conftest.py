"""Shared by all tests: the command line, a tiny model's folder, a server for `serve`."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import pytest
import torch
from samples import TINY

if TYPE_CHECKING:
    from fake_server import Fake


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device; torch sees none"))


@pytest.fixture(autouse=True)
def cpu_unless_marked(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tests say the same on every machine: only those marked `gpu` see one."""
    if not request.node.get_closest_marker("gpu"):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


class Answer(NamedTuple):
    """What a command left behind."""

    code: int
    out: str
    err: str


@pytest.fixture
def mot_bench(capfd: pytest.CaptureFixture[str]) -> Callable[..., Answer]:
    """Run the command in this process."""
    from mot_bench.cli import main

    def run(*arguments: object) -> Answer:
        with pytest.raises(SystemExit) as exit_:
            main([str(argument) for argument in arguments])
        out, err = capfd.readouterr()
        assert isinstance(exit_.value.code, int)
        return Answer(exit_.value.code, out, err)

    return run


@pytest.fixture
def model_folder(tmp_path: Path) -> Path:
    """A checkpoint folder with the sizes of `TINY`."""
    folder = tmp_path / "model"
    folder.mkdir()
    sizes = {
        "hidden_size": TINY.hidden,
        "intermediate_size": TINY.intermediate,
        "num_attention_heads": TINY.heads,
        "num_key_value_heads": TINY.kv_heads,
    }
    (folder / "llm_config.json").write_text(json.dumps(sizes))
    return folder


@pytest.fixture(scope="module")
def one_server() -> Iterator[Fake]:
    from fake_server import serving  # fastapi: for these tests alone

    with serving() as fake:
        yield fake


@pytest.fixture
def fake(one_server: Fake, monkeypatch: pytest.MonkeyPatch) -> Fake:
    one_server.reset()
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    return one_server


@pytest.fixture
def bench(fake: Fake, mot_bench: Any, tmp_path: Path) -> Callable[..., Any]:
    """Run the command on the fake server with given prompts; return its answer and results."""
    from mot_bench.serve.results import ServeResults

    def run(prompts: list[str] | None, *arguments: object, url: str = "") -> Any:
        output = tmp_path / "results.json"
        options: list[object] = ["--base-url", url or fake.url, "--output", output]
        if prompts is not None:
            file = tmp_path / "prompts.txt"
            file.write_text("\n".join(prompts))
            options += ["--prompts", file]
        answer = mot_bench("serve", *options, *arguments)
        return answer, ServeResults.read(output) if output.exists() else None

    return run
