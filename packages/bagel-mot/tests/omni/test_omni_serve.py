"""The commands of docs/serving.md, as vLLM-Omni's own parser and configuration take them."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from golden_data import GOLDEN
from omni_harness import require_omni, sampling

require_omni()
if importlib.util.find_spec("vllm_omni.config.resolver") is None:
    pytest.skip("this vLLM-Omni resolves its configuration otherwise", allow_module_level=True)

WORKER = Path(__file__).with_name("omni_serve_worker.py")
DOCS = Path(__file__).parents[4] / "docs" / "serving.md"
# vLLM-Omni's deploy file as it is.
ALONE = ["serve", str(GOLDEN.checkpoint), "--omni", "--deploy-config", "bagel_single_stage.yaml"]


def documented() -> list[list[str]]:
    """Arguments of every `vllm serve --omni` in the docs, with the golden model for BAGEL's."""
    blocks = re.findall(r"(?:^ {4}.*\n)+", DOCS.read_text(encoding="utf-8"), re.MULTILINE)
    return [arguments(block) for block in blocks if "vllm serve" in block and "--omni" in block]


def arguments(command: str) -> list[str]:
    """What a shell gives `vllm`."""
    shell = "vllm() { printf '%s\\0' \"$@\"; }\n" + command
    done = subprocess.run(["bash", "-c", shell], capture_output=True, text=True, check=True)
    words = done.stdout.removesuffix("\0").split("\0")
    return [str(GOLDEN.checkpoint) if word == "BAGEL-7B-MoT" else word for word in words]


@pytest.fixture(scope="module")
def configured() -> list[dict[str, Any]]:
    """What the documented commands come to (one stage, edits, two stages), then `ALONE`."""
    done = subprocess.run(
        [sys.executable, str(WORKER), json.dumps([*documented(), ALONE])],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    found: list[dict[str, Any]] = json.loads(done.stdout.strip().rsplit("\n", 1)[-1])
    return found


def test_documented_commands(configured: list[dict[str, Any]]) -> None:
    """Graphs are on and requests are batched, in either deployment."""
    *found, _ = configured
    assert [each["stages"] for each in found] == [1, 1, 2]
    for each in found:
        assert (each["enforce_eager"], each["max_num_seqs"]) == (False, 8)
        assert each["need_recv_cache"] == (each["stages"] == 2)


def test_deploy_file_alone(configured: list[dict[str, Any]]) -> None:
    """Why the commands need options: vLLM-Omni's own file has graphs and batches off."""
    alone = configured[-1]
    assert (alone["stages"], alone["enforce_eager"], alone["max_num_seqs"]) == (1, True, 1)


def test_documented_edit_settings(configured: list[dict[str, Any]]) -> None:
    """The defaults of the second command make `/v1/images/edits` edit as officially."""
    from bagel_mot.config import BagelConfig
    from bagel_mot.plugins.omni_request import read_request
    from bagel_mot.sampling import ImageSettings

    config = BagelConfig.from_folder(GOLDEN.checkpoint)
    asked = read_request("a red fox", sampling(extra_args=configured[1]["edit"]), config)
    assert asked.settings == ImageSettings.for_editing()
