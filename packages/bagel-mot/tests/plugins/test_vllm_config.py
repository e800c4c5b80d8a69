"""What the plugin makes of vLLM's configuration and of a checkpoint's tokenizer."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from golden_data import GOLDEN
from transformers import AutoTokenizer
from vllm.config import CUDAGraphMode
from vllm.transformers_utils.configs.bagel import BagelConfig as HfBagelConfig

from bagel_mot.config import BagelConfig
from bagel_mot.plugins.vllm_config import SCHEDULER, UnderstandingConfig, bagel_config
from bagel_mot.plugins.vllm_pictures import check_tokenizer
from bagel_mot.plugins.vllm_scheduler import check_limits


def vllm_config(**scheduler: Any) -> Any:
    options = {"scheduler_cls": None, "disable_chunked_mm_input": False} | scheduler
    return SimpleNamespace(
        scheduler_config=SimpleNamespace(**options),
        compilation_config=SimpleNamespace(cudagraph_mode=None),
    )


def test_scheduler() -> None:
    """Ours, whether asked for or not; asking twice changes nothing."""
    config = vllm_config()
    for _ in range(2):
        UnderstandingConfig.verify_and_update_config(config)
        assert config.scheduler_config.scheduler_cls == SCHEDULER
        assert config.scheduler_config.disable_chunked_mm_input
    with pytest.raises(ValueError, match=r"scheduler_cls is 'my\.Scheduler'; BAGEL needs its own"):
        UnderstandingConfig.verify_and_update_config(vllm_config(scheduler_cls="my.Scheduler"))


@pytest.mark.parametrize("mode", list(CUDAGraphMode))
def test_cuda_graphs_of_prefills(mode: CUDAGraphMode) -> None:
    """No graph may hold a prefill step."""
    config = vllm_config()
    config.compilation_config.cudagraph_mode = mode
    if mode.mixed_mode() == CUDAGraphMode.FULL:
        with pytest.raises(ValueError, match="cudagraph_mode is FULL"):
            UnderstandingConfig.verify_and_update_config(config)
    else:
        UnderstandingConfig.verify_and_update_config(config)


def test_check_limits() -> None:
    check_limits(51, max_num_scheduled_tokens=51, long_prefill_token_threshold=0)
    with pytest.raises(ValueError, match="long_prefill_token_threshold is 20, but a picture takes"):
        check_limits(51, max_num_scheduled_tokens=64, long_prefill_token_threshold=20)


def hf_config(**changes: Any) -> HfBagelConfig:
    """What vLLM reads of the golden config.json."""
    entries = GOLDEN.json("checkpoint/config.json") | changes
    for key in ("architectures", "model_type"):
        del entries[key]
    return HfBagelConfig(**entries)


def test_another_rope_is_refused() -> None:
    """As `hf_overrides` may ask for; our tables are plain."""
    yarn = {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e6}
    llm = GOLDEN.json("checkpoint/config.json")["llm_config"] | {"rope_parameters": yarn}
    with pytest.raises(ValueError, match="rotary embeddings of type 'yarn'; BAGEL has plain ones"):
        bagel_config(
            SimpleNamespace(model=str(GOLDEN.checkpoint), hf_config=hf_config(llm_config=llm))
        )
    model = SimpleNamespace(hf_config=SimpleNamespace(rope_parameters=yarn))
    with pytest.raises(ValueError, match=r"hf_overrides: rope_parameters is .*has plain RoPE"):
        UnderstandingConfig.verify_and_update_model_config(model)


def test_config_of_a_hub() -> None:
    """Without a folder to read, the sizes are those of config.json; the limits the official."""
    hub = SimpleNamespace(model="someone/BAGEL", hf_config=hf_config())
    folder = SimpleNamespace(model=str(GOLDEN.checkpoint), hf_config=hub.hf_config)
    ours, theirs = bagel_config(folder), bagel_config(hub)
    assert ours == BagelConfig.from_folder(GOLDEN.checkpoint)
    assert (theirs.llm, theirs.vit, theirs.vit_grid) == (ours.llm, ours.vit, ours.vit_grid)
    assert theirs.vit_transform.max_side == 980


def test_config_of_a_smaller_table(tmp_path: Path) -> None:
    """Pictures are made small enough for it, as in the pipeline."""
    for file in GOLDEN.checkpoint.glob("*.json"):
        shutil.copy(file, tmp_path)
    limits = tmp_path / "oracle_config.json"
    if limits.exists():
        limits.unlink()  # then they are the official ones
    hf = hf_config(vit_max_num_patch_per_side=6)
    found = bagel_config(SimpleNamespace(model=str(tmp_path), hf_config=hf))
    assert found == BagelConfig.from_folder(tmp_path).with_grids(found.latent_grid**2, 36)
    assert found.vit_grid == 6
    assert found.vit_transform.max_side == 6 * found.vit.patch_size


def test_check_tokenizer(caplog: pytest.LogCaptureFixture) -> None:
    """Silent about the official defaults; each deviation has its remedy."""
    tokenizer = AutoTokenizer.from_pretrained(GOLDEN.checkpoint)

    def said() -> list[str]:
        return [record.getMessage() for record in caplog.records if record.name == "bagel_mot"]

    check_tokenizer(tokenizer)
    assert not said()
    tokenizer = AutoTokenizer.from_pretrained(GOLDEN.checkpoint)
    tokenizer.eos_token = "<|endoftext|>"
    tokenizer.chat_template = "{% for m in messages %}{{ m['role'] }}{% endfor %}"
    check_tokenizer(tokenizer)
    check_tokenizer(tokenizer)
    end, template = said()
    assert "give requests stop_token_ids=[514]" in end
    assert "pass --chat-template /" in template and "bagel_chat.jinja" in template
