"""The entry point: what it registers, when, and that it is light and harmless elsewhere."""

from __future__ import annotations

import importlib
import json
import os
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from golden_data import GOLDEN
from omni_harness import World, require_omni

require_omni()

PACKAGE = Path(__file__).parents[2]
FUNCTIONS = ("get_bagel_pre_process_func", "get_bagel_post_process_func")
MODULE = "bagel_mot.plugins.omni_pipeline"


@pytest.fixture
def registry(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """vLLM-Omni's registry, put back afterwards."""
    from vllm_omni.diffusion import registry

    monkeypatch.delenv("BAGEL_MOT_REPLACE_OMNI", raising=False)
    for name in (
        "_DIFFUSION_MODELS",
        "_DIFFUSION_PRE_PROCESS_FUNCS",
        "_DIFFUSION_POST_PROCESS_FUNCS",
    ):
        monkeypatch.setattr(registry, name, dict(getattr(registry, name)))
    models = registry.DiffusionModelRegistry.models
    before = dict(models)
    yield registry
    models.clear()
    models.update(before)


def resolved(registry: Any, name: str) -> type | None:
    """The class behind a name."""
    found: type | None = registry.DiffusionModelRegistry._try_load_model_cls(name)
    return found


def test_entry_point() -> None:
    """The package declares the function."""
    project = tomllib.loads((PACKAGE / "pyproject.toml").read_text())["project"]
    value = project["entry-points"]["vllm_omni.general_plugins"]["bagel_mot"]
    module, _, function = value.partition(":")
    assert callable(getattr(importlib.import_module(module), function))


def test_own_name(registry: Any) -> None:
    """`MoTBagelPipeline` is ours; `BagelPipeline` stays vLLM-Omni's."""
    from bagel_mot.plugins.omni import register

    own = registry._DIFFUSION_MODELS["BagelPipeline"]
    register()
    assert resolved(registry, "MoTBagelPipeline").__module__ == MODULE
    assert registry._DIFFUSION_PRE_PROCESS_FUNCS["MoTBagelPipeline"] == FUNCTIONS[0]
    assert registry._DIFFUSION_POST_PROCESS_FUNCS["MoTBagelPipeline"] == FUNCTIONS[1]
    assert registry._DIFFUSION_MODELS["BagelPipeline"] == own
    assert registry.DiffusionModelRegistry.models["BagelPipeline"].module_name != MODULE


@pytest.mark.parametrize("value", ["1", "true", " On "])
def test_replacement(registry: Any, monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    """The variable puts ours in place of `BagelPipeline`."""
    from bagel_mot.plugins.omni import register

    monkeypatch.setenv("BAGEL_MOT_REPLACE_OMNI", value)
    register()
    assert resolved(registry, "BagelPipeline").__module__ == MODULE
    module = importlib.import_module(registry._DIFFUSION_MODELS["BagelPipeline"][0])
    assert all(callable(getattr(module, name)) for name in FUNCTIONS)


@pytest.mark.parametrize("value", ["", "0", "no", "maybe"])
def test_no_replacement(
    registry: Any,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    value: str,
) -> None:
    """Other values leave it alone; one that is neither yes nor no is mentioned."""
    from bagel_mot.plugins.omni import register

    monkeypatch.setenv("BAGEL_MOT_REPLACE_OMNI", value)
    with caplog.at_level("WARNING", logger="bagel_mot"):
        register()
    assert registry._DIFFUSION_MODELS["BagelPipeline"][0] != MODULE
    assert ("maybe" in caplog.text) == (value == "maybe")


def test_register_again(registry: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A second call changes nothing."""
    from bagel_mot.plugins.omni import register

    monkeypatch.setenv("BAGEL_MOT_REPLACE_OMNI", "1")
    register()
    models = dict(registry._DIFFUSION_MODELS)
    functions = dict(registry._DIFFUSION_PRE_PROCESS_FUNCS)
    classes = {name: resolved(registry, name) for name in ("BagelPipeline", "MoTBagelPipeline")}
    register()
    assert models == registry._DIFFUSION_MODELS
    assert functions == registry._DIFFUSION_PRE_PROCESS_FUNCS
    assert {name: resolved(registry, name) for name in classes} == classes


def test_golden_folder(world: World, registry: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """An official folder resolves to `BagelPipeline`, which the variable makes ours."""
    from vllm_omni.diffusion.data import OmniDiffusionConfig

    from bagel_mot.plugins.omni import register

    monkeypatch.setenv("BAGEL_MOT_REPLACE_OMNI", "1")
    register()
    config = OmniDiffusionConfig(model=str(GOLDEN.checkpoint))
    config.enrich_config()
    assert config.model_class_name == "BagelPipeline"
    assert resolved(registry, config.model_class_name).__module__ == MODULE
    for load in ("get_diffusion_pre_process_func", "get_diffusion_post_process_func"):
        assert callable(getattr(registry, load)(config))


def test_private_name(world: World, registry: Any, tmp_path: Path) -> None:
    """A folder whose config.json names our class resolves to it without the variable."""
    from vllm_omni.diffusion.data import OmniDiffusionConfig

    from bagel_mot.plugins.omni import register

    register()
    folder = tmp_path / "checkpoint"
    shutil.copytree(GOLDEN.checkpoint, folder)
    content = json.loads((folder / "config.json").read_text())
    del content["model_type"]
    content["architectures"] = ["MoTBagelPipeline"]
    (folder / "config.json").write_text(json.dumps(content))
    config = OmniDiffusionConfig(model=str(folder))
    config.enrich_config()
    assert config.model_class_name == "MoTBagelPipeline"
    assert resolved(registry, config.model_class_name).__module__ == MODULE


def run_python(program: str) -> str:
    """What a program prints, in a Python of its own."""
    done = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


def test_import_is_light() -> None:
    """Importing the entry point imports nothing large."""
    program = (
        "import sys, bagel_mot.plugins.omni\n"
        "print([m for m in ('torch', 'vllm', 'vllm_omni', 'pydantic') if m in sys.modules])"
    )
    assert run_python(program).strip() == "[]"


def test_without_omni() -> None:
    """Where vLLM-Omni is missing, nothing happens and nothing is said."""
    program = (
        "import importlib.util as u, sys\n"
        "find = u.find_spec\n"
        "u.find_spec = lambda name, *a: None if name == 'vllm_omni' else find(name, *a)\n"
        "from bagel_mot.plugins.omni import register\n"
        "assert register() is None and register() is None\n"
        "assert 'torch' not in sys.modules"
    )
    assert run_python(program) == ""


def test_omni_without_registry(caplog: pytest.LogCaptureFixture) -> None:
    """A vLLM-Omni that cannot be plugged into is mentioned, and goes on without us."""
    from unittest.mock import patch

    from bagel_mot.plugins.omni import register

    with patch.dict(sys.modules, {"vllm_omni.diffusion.registry": None}):
        register()
    assert "MoTBagelPipeline is not registered" in caplog.text
