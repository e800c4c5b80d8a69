"""Setting vLLM's layers up outside its engine, and taking that down again."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from vllm.config import get_current_vllm_config_or_none, set_current_vllm_config
from vllm.distributed import parallel_state

from mot_layers import MoTRMSNorm, runtime
from mot_layers.runtime import init_parallel, shutdown_parallel, single_process


def is_set_up() -> tuple[bool, bool, bool]:
    """Current configuration, vLLM's groups, torch's process group."""
    return (
        get_current_vllm_config_or_none() is not None,
        parallel_state.model_parallel_is_initialized(),
        torch.distributed.is_initialized(),
    )


ALL, NONE = (True, True, True), (False, False, False)


@pytest.fixture(autouse=True)
def nothing_remains() -> Iterator[None]:
    assert is_set_up() == NONE
    yield
    shutdown_parallel()
    assert is_set_up() == NONE


def test_init_and_shutdown() -> None:
    for _ in range(2):  # a second time as well
        init_parallel()
        assert is_set_up() == ALL
        assert parallel_state.get_tensor_model_parallel_world_size() == 1
        MoTRMSNorm(8)(torch.randn(2, 8))
        shutdown_parallel()
        assert is_set_up() == NONE


@pytest.mark.parametrize(("asked", "heard"), [(None, False), ("INFO", True)], ids=str)
def test_vllm_gives_no_advice_about_its_engine(
    asked: str | None, heard: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its logger has no handler here: what it warns of would go to stderr."""
    if asked is None:
        monkeypatch.delenv("VLLM_LOGGING_LEVEL", raising=False)
    else:
        monkeypatch.setenv("VLLM_LOGGING_LEVEL", asked)
    levels: list[int] = []
    make = runtime.VllmConfig
    vllm = logging.getLogger("vllm")
    before = vllm.level

    def watched(**options: Any) -> Any:
        levels.append(vllm.getEffectiveLevel())
        return make(**options)

    monkeypatch.setattr(runtime, "VllmConfig", watched)
    with single_process():
        assert vllm.level == before
    assert [level < logging.ERROR for level in levels] == [heard]


def test_init_twice_is_init_once() -> None:
    init_parallel()
    config = get_current_vllm_config_or_none()
    init_parallel()
    assert get_current_vllm_config_or_none() is config
    shutdown_parallel()
    assert is_set_up() == NONE
    shutdown_parallel()  # harmless


def test_before_shutdown() -> None:
    """While all is still there; and nothing where nothing is taken down."""
    seen: list[tuple[bool, bool, bool]] = []
    runtime.before_shutdown(lambda: pytest.fail("nothing is set up"))
    init_parallel()
    runtime.before_shutdown(lambda: seen.append(is_set_up()))
    shutdown_parallel()
    init_parallel()
    shutdown_parallel()
    assert seen == [ALL]


def test_capturing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several tensor parallel ranks capture inside their group's own context, on the stream."""

    class Group:
        world_size = 2
        graph_capture = staticmethod(lambda context: nullcontext(context.stream))

    stream: Any = object()
    with single_process(), runtime.capturing(stream) as found:
        assert found is None
    monkeypatch.setattr(parallel_state, "get_tp_group", Group)
    with runtime.capturing(stream) as found:
        assert found is stream


def test_single_process() -> None:
    with single_process():
        with single_process():
            assert is_set_up() == ALL
        assert is_set_up() == ALL
    assert is_set_up() == NONE


def test_single_process_is_undone_after_an_error() -> None:
    with pytest.raises(KeyError), single_process():
        raise KeyError
    assert is_set_up() == NONE


def test_single_process_keeps_an_earlier_init() -> None:
    init_parallel()
    with single_process():
        pass
    assert is_set_up() == ALL


def test_a_current_configuration_is_kept() -> None:
    config = runtime._default_config(tp_size=1)
    with set_current_vllm_config(config):
        with single_process():
            assert get_current_vllm_config_or_none() is config
        assert get_current_vllm_config_or_none() is config
        assert is_set_up() == (True, False, False)


def test_groups_of_others_are_kept() -> None:
    init_parallel()
    engine, runtime._active = runtime._active, None  # as if vLLM's engine had made all of it
    assert engine is not None
    with engine:
        with single_process():
            assert is_set_up() == ALL
        assert is_set_up() == ALL


def test_what_was_set_up_in_two_steps_is_undone_in_one(tmp_path: os.PathLike[str]) -> None:
    with set_current_vllm_config(runtime._default_config(tp_size=1)):
        parallel_state.init_distributed_environment(1, 0, f"file://{tmp_path}/store", 0, "gloo")
        parallel_state.initialize_model_parallel()
    init_parallel()  # adds the configuration
    parallel_state.destroy_model_parallel()
    parallel_state.destroy_distributed_environment()
    init_parallel()  # adds groups
    assert is_set_up() == ALL
    shutdown_parallel()
    assert is_set_up() == NONE


def test_a_process_group_of_others_is_kept(tmp_path: os.PathLike[str]) -> None:
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1
    )
    try:
        with single_process():
            assert is_set_up() == ALL
        assert is_set_up() == (False, False, True)
        with single_process():
            assert is_set_up() == ALL
    finally:
        parallel_state.destroy_distributed_environment()


def test_failure_leaves_nothing_behind() -> None:
    with pytest.raises((ValueError, RuntimeError)):
        init_parallel(backend="no such backend", init_method="ftp://nowhere")


def test_other_tp_size() -> None:
    init_parallel()
    with pytest.raises(ValueError, match=r"tp_size is 2, .* tensor parallel size 1; call shutdown"):
        init_parallel(tp_size=2, world_size=2)


@pytest.mark.parametrize(
    ("tp_size", "rank", "world_size"), [(2, 0, 1), (0, 0, 1), (2, 0, 3), (1, 1, 1), (1, -1, 1)]
)
def test_sizes_that_do_not_fit(tp_size: int, rank: int, world_size: int) -> None:
    with pytest.raises(ValueError, match="tp_size must divide world_size"):
        init_parallel(tp_size, rank, world_size)


def test_missing_init_method() -> None:
    with pytest.raises(ValueError, match="init_method must say where the processes meet"):
        init_parallel(tp_size=2, world_size=2)


def test_without_compiled_operators(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(runtime, "has_compiled_operators", lambda: False)
    with caplog.at_level(logging.WARNING, logger="mot_layers"), single_process():
        config = get_current_vllm_config_or_none()
        assert config is not None
        assert "none" in config.compilation_config.custom_ops
        for priority in (
            config.kernel_config.ir_op_priority.rms_norm,
            config.kernel_config.ir_op_priority.fused_add_rms_norm,
        ):
            assert priority[0] == "native"
        MoTRMSNorm(8)(torch.randn(2, 8), residual=torch.randn(2, 8))
    assert [r.getMessage()[:26] for r in caplog.records if r.name == "mot_layers"] == [
        "vLLM's compiled operators "
    ]


def test_import_without_vllm() -> None:
    code = "import sys; sys.modules['vllm'] = None; import mot_layers"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 1
    assert "ImportError: mot-layers needs vLLM; install it with" in result.stderr
    assert "`pip install 'mot-layers[cuda]'` (GPU)" in result.stderr
    assert "`pip install 'mot-layers[cpu]'` (CPU)" in result.stderr
