"""The entry point: what importing it costs, what it registers and when; the prompt's layout."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import pytest
from golden_data import GOLDEN
from transformers import AutoTokenizer

from bagel_mot.plugins.vllm import CHAT_TEMPLATE, PICTURE, build_prompt
from bagel_mot.tokenizer import BagelTokenizer

OWN, BUILT_IN = "MoTBagelForConditionalGeneration", "BagelForConditionalGeneration"


def run(code: str, environment: dict[str, str]) -> str:
    """The last line that a fresh interpreter prints."""
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout.strip().rsplit("\n", 1)[-1]


def test_listed_by_name(declared: dict[str, str]) -> None:
    """`VLLM_PLUGINS=bagel_mot` chooses it."""
    assert declared == {"bagel_mot": "bagel_mot.plugins.vllm:register"}


def test_import_is_light(plugin_env: dict[str, str]) -> None:
    """Importing the module imports neither torch nor vLLM, nor the rest of the package."""
    code = (
        "import sys; from bagel_mot.plugins.vllm import register\n"
        "heavy = {'torch', 'vllm', 'transformers', 'bagel_mot.pipeline', 'bagel_mot.config'}\n"
        "print(sorted(heavy & set(sys.modules)))"
    )
    assert run(code, plugin_env) == "[]"


def test_without_vllm(plugin_env: dict[str, str]) -> None:
    """Where vLLM is missing, nothing happens and nothing is said."""
    code = (
        "import importlib.util as u, sys, io\n"
        "find = u.find_spec\n"
        "u.find_spec = lambda name, *a: None if name == 'vllm' else find(name, *a)\n"
        "sys.modules['vllm'] = None\n"
        "sys.stderr = said = io.StringIO()\n"
        "from bagel_mot.plugins.vllm import register\n"
        "register(); register()\n"
        "print([said.getvalue(), 'torch' in sys.modules])"
    )
    assert run(code, plugin_env) == "['', False]"


def test_unknown_vllm_is_left_alone(plugin_env: dict[str, str]) -> None:
    """A vLLM without what we need gets a warning, and its process goes on."""
    code = (
        "import sys, types, logging\n"
        "sys.modules['vllm'] = types.ModuleType('vllm')\n"
        "sys.modules['vllm'].__spec__ = __import__('importlib.machinery').machinery.ModuleSpec("
        "'vllm', None)\n"
        "said = []\n"
        "logging.getLogger('bagel_mot').warning = lambda *args: said.append(args[0] % args[1:])\n"
        "from bagel_mot.plugins.vllm import register\n"
        "register()\n"
        "print(said)"
    )
    assert "MoTBagelForConditionalGeneration is not registered" in run(code, plugin_env)


def test_registry(plugin_env: dict[str, str]) -> None:
    """What vLLM knows as BAGEL with the plugin off, on, on twice, and in place of its own."""
    code = f"""
import json, os
import vllm.plugins as plugins
from vllm import ModelRegistry
from vllm.model_executor.models.config import MODELS_CONFIG_MAP

def look():
    models = ModelRegistry.models
    names = [models[n].module_name if n in models else None for n in ({OWN!r}, {BUILT_IN!r})]
    return [*names, sorted({{{OWN!r}, {BUILT_IN!r}}} & set(MODELS_CONFIG_MAP))]

def load(**variables):
    os.environ.update(variables)
    plugins.plugins_loaded = False
    plugins.load_general_plugins()
    return look()

print(json.dumps([
    look(),
    load(VLLM_PLUGINS=""),
    load(VLLM_PLUGINS="another"),
    load(VLLM_PLUGINS="another,bagel_mot"),
    load(BAGEL_MOT_REPLACE_VLLM="0"),
    load(BAGEL_MOT_REPLACE_VLLM="1"),
]))
"""
    ours, theirs = "bagel_mot.plugins.vllm_model", "vllm.model_executor.models.bagel"
    off, on = [None, theirs, []], [ours, theirs, [OWN]]
    want = [off, off, off, on, on, [ours, ours, [BUILT_IN, OWN]]]
    assert json.loads(run(code, plugin_env)) == want


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    """The checkpoint's tokenizer as vLLM loads it."""
    return AutoTokenizer.from_pretrained(GOLDEN.checkpoint)


def render(tokenizer: Any, messages: list[dict[str, Any]], **options: Any) -> str:
    template = CHAT_TEMPLATE.read_text(encoding="utf-8")
    options = {"add_generation_prompt": True} | options
    text: str = tokenizer.apply_chat_template(
        messages, chat_template=template, tokenize=False, **options
    )
    return text


def test_chat_template(tokenizer: Any) -> None:
    """No roles: each text a segment, each picture by itself, the answer's start at the end."""
    picture, text = {"type": "image"}, {"type": "text", "text": " What?\n"}
    segment, start = "<|im_start|> What?\n<|im_end|>", "<|im_start|>"
    user = {"role": "user", "content": [picture, text, picture]}
    assert render(tokenizer, [user]) == PICTURE + segment + PICTURE + start
    plain = {"role": "user", "content": " What?\n"}
    assert render(tokenizer, [plain]) == segment + start
    turns = [
        {"role": "system", "content": "a"},
        plain,
        {"role": "assistant", "content": "b"},
        plain,
    ]
    first, second = "<|im_start|>a<|im_end|>", "<|im_start|>b<|im_end|>"
    assert render(tokenizer, turns) == first + segment + second + segment + start
    assert render(tokenizer, [plain], add_generation_prompt=False) == segment
    with pytest.raises(Exception, match="reads text and images, not video"):
        render(tokenizer, [{"role": "user", "content": [{"type": "video"}]}])


def test_build_prompt_is_the_template(tokenizer: Any) -> None:
    """Both ways to a prompt give the same; pictures go along in their order."""
    first, second = object(), object()
    prompt = build_prompt([first, "One.", second, "Two."])
    text = [{"type": "text", "text": each} for each in ("One.", "Two.")]
    content = [{"type": "image"}, text[0], {"type": "image"}, text[1]]
    assert prompt["prompt"] == render(tokenizer, [{"role": "user", "content": content}])
    assert prompt["multi_modal_data"] == {"image": [first, second]}
    assert "multi_modal_data" not in build_prompt(["One."])


def test_tokens_of_the_layout(tokenizer: Any) -> None:
    """vLLM's tokens of a prompt are those of our text segments, and those recorded."""
    own = BagelTokenizer.from_folder(GOLDEN.checkpoint)
    texts = [entry["text"] for entry in GOLDEN.json("tokens.json")]
    texts += [GOLDEN.case(name).json["inputs"][-1]["text"] for name in ("c1", "c2", "d1", "d2")]
    for text in texts:
        got = tokenizer.encode(build_prompt([text])["prompt"], add_special_tokens=False)
        assert got == [*own.text_segment(text), own.bos], text
