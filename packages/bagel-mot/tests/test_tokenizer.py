"""The tokenizer against recorded ids and texts, read from either set of files."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from golden_data import GOLDEN
from tokenizers import Tokenizer

from bagel_mot.tokenizer import SPECIAL_TOKENS, BagelTokenizer, _build_qwen2

EXAMPLES: list[dict[str, Any]] = GOLDEN.json("tokens.json")
TEXT_CASES = [name for name in GOLDEN.names if name[0] in "cd"]

# Beyond tokens.json: what the cutting into words and the byte level can get wrong.
MORE_TEXTS = (
    "It'S we'LL I'd",
    "a  \n\n  b\t\tc \r\n d   ",
    "Ünïcödé, naïve e\u0301 \u1100\u1161 ﬁ",
    "price: $1,234.50 (100%)!?\n",
    "عربى עברית हिन्दी ไทย",
    "\u00a0\u2003\u200b\ufeff",
    "👩‍👩‍👧‍👦🏳️‍🌈\x00\x7f",
    "<|im_start|><|im_end|> <|vision_pad|><tool_call>{}</tool_call><|unknown|>",
    "_snake_case CamelCase x1y2z3",
    "",
)


@pytest.fixture(scope="module")
def tokenizer() -> BagelTokenizer:
    return BagelTokenizer.from_folder(GOLDEN.checkpoint)


def copy(target: Path, *names: str) -> Path:
    for name in names:
        shutil.copy(GOLDEN.checkpoint / name, target / name)
    return target


@pytest.fixture(
    params=["tokenizer-json", "both-lists", "config-list", "plain-list"], scope="module"
)
def either(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> BagelTokenizer:
    """The same tokenizer from every set of files that describes it."""
    files = {
        "tokenizer-json": ["tokenizer.json"],
        "both-lists": ["tokenizer_config.json", "added_tokens.json"],
        "config-list": ["tokenizer_config.json"],
        "plain-list": ["added_tokens.json"],
    }[request.param]
    if request.param != "tokenizer-json":
        files += ["vocab.json", "merges.txt"]
    return BagelTokenizer.from_folder(copy(tmp_path_factory.mktemp("tokenizer"), *files))


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda example: repr(example["text"])[:24])
def test_encode_decode_recorded(either: BagelTokenizer, example: dict[str, Any]) -> None:
    assert either.encode(example["text"]) == example["ids"]
    assert either.decode(example["ids"]) == example["decoded"]


@pytest.mark.parametrize("text", MORE_TEXTS, ids=lambda text: ascii(text)[:24])
def test_encode_fallback_equals_tokenizer_json(either: BagelTokenizer, text: str) -> None:
    # The library itself and not our wrapper, so that the two cannot share a mistake.
    whole = Tokenizer.from_file(str(GOLDEN.checkpoint / "tokenizer.json"))
    ids = whole.encode(text, add_special_tokens=False).ids
    assert either.encode(text) == ids
    assert either.decode(ids) == whole.decode(ids, skip_special_tokens=False)


@pytest.mark.parametrize("part", ["normalizer", "pre_tokenizer"])
def test_fallback_cuts_text_as_tokenizer_json(tmp_path: Path, part: str) -> None:
    # The recorded vocabulary merges no digits or capitals, so that ids cannot show every cut.
    built = _build_qwen2(copy(tmp_path, "vocab.json", "merges.txt"))
    assert json.loads(built.to_str())[part] == GOLDEN.json("checkpoint/tokenizer.json")[part]


def test_errors_of_our_own_are_not_the_files(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_self: BagelTokenizer, _content: str) -> int:
        raise KeyError("a mistake of ours")

    monkeypatch.setattr(BagelTokenizer, "_id_of", fail)
    with pytest.raises(KeyError, match="a mistake of ours"):
        BagelTokenizer.from_folder(GOLDEN.checkpoint)


def test_special_ids_and_size(either: BagelTokenizer) -> None:
    ids = GOLDEN.case("c1").json["special_token_ids"]
    assert either.bos == ids["bos_token_id"]
    assert either.eos == ids["eos_token_id"]
    assert either.vision_start == ids["start_of_image"]
    assert either.vision_end == ids["end_of_image"]
    assert len(either) == 534


@pytest.mark.parametrize("name", GOLDEN.names)
def test_text_segment_recorded(tokenizer: BagelTokenizer, name: str) -> None:
    case = GOLDEN.case(name)
    segments = case.segments("text")
    assert segments
    for prefix, segment in segments:
        ids = case.tensors[f"{prefix}.token_ids"].tolist()
        assert tokenizer.text_segment(segment["text"]) == ids, prefix


@pytest.mark.parametrize("name", TEXT_CASES)
def test_answer_recorded(either: BagelTokenizer, name: str) -> None:
    case = GOLDEN.case(name)
    fed = case.tensors["text0.token_ids"].tolist()
    assert either.answer(fed) == case.json["texts"][0]["text"] == case.json["text_output"]
    assert either.answer([*fed, either.eos, *fed]) == case.json["text_output"]


def test_answer_cuts(tokenizer: BagelTokenizer) -> None:
    bos, eos = tokenizer.bos, tokenizer.eos
    hello, world = tokenizer.encode("Hello"), tokenizer.encode(" world")
    vision, pad = tokenizer.vision_start, tokenizer.encode("<|endoftext|>")
    assert tokenizer.answer([bos, *hello, bos, *world]) == "Hello"
    assert tokenizer.answer([bos, *hello, eos, *world, bos]) == "Hello"
    assert tokenizer.answer([bos, *hello, vision, *world, *pad]) == (
        "Hello<|vision_start|> world<|endoftext|>"
    )
    assert tokenizer.answer([*world, bos, *hello]) == "Hello"
    assert tokenizer.answer([bos]) == ""
    spelled = [token for part in ("<|im", "_end|>") for token in tokenizer.encode(part)]
    assert eos not in spelled
    assert tokenizer.answer([bos, *hello, *spelled, *world]) == "Hello"


def test_answer_invalid_utf8(tokenizer: BagelTokenizer) -> None:
    fox = tokenizer.encode("🦊")
    assert tokenizer.answer([tokenizer.bos, *fox[:-1]]) == "\ufffd"
    assert tokenizer.answer([tokenizer.bos, fox[-1], *tokenizer.encode("a")]) == "\ufffda"


@pytest.mark.parametrize("ids", ["empty", "end-first"])
def test_answer_without_start(tokenizer: BagelTokenizer, ids: str) -> None:
    tokens = [] if ids == "empty" else [tokenizer.eos, tokenizer.bos]
    with pytest.raises(ValueError, match=r"ids decode to ''.*expected '<\|im_start\|>' \(id 513\)"):
        tokenizer.answer(tokens)


def test_decode_leaves_out_ids_beyond_the_vocabulary(tokenizer: BagelTokenizer) -> None:
    hello = tokenizer.encode("Hello")
    assert tokenizer.decode([*hello, len(tokenizer), *hello]) == "HelloHello"


@pytest.mark.parametrize("files", ["tokenizer-json", "fallback"])
def test_missing_special_tokens_are_added(tmp_path: Path, files: str) -> None:
    lost = {"<|im_start|>", "<|vision_start|>", "<|vision_end|>"}
    if files == "tokenizer-json":
        content = GOLDEN.json("checkpoint/tokenizer.json")
        content["added_tokens"] = [
            token for token in content["added_tokens"] if token["content"] == "<|endoftext|>"
        ]
        (tmp_path / "tokenizer.json").write_text(json.dumps(content))
        expected = [513, 514, 515, 516]
    else:
        copy(tmp_path, "vocab.json", "merges.txt")
        added = GOLDEN.json("checkpoint/added_tokens.json")
        kept = {text: number for text, number in added.items() if text not in lost}
        (tmp_path / "added_tokens.json").write_text(json.dumps(kept))
        expected = [534, 514, 535, 536]  # after the last, though 513 is free
    tokenizer = BagelTokenizer.from_folder(tmp_path)
    ids = [tokenizer.bos, tokenizer.eos, tokenizer.vision_start, tokenizer.vision_end]
    assert ids == expected
    assert len(tokenizer) == max(expected) + 1
    for text, number in zip(SPECIAL_TOKENS, expected, strict=True):
        assert tokenizer.encode(f"a{text}b") == [64, number, 65]
        assert tokenizer.decode([64, number, 65]) == f"a{text}b"


def test_special_token_of_the_vocabulary_keeps_its_id(tmp_path: Path) -> None:
    copy(tmp_path, "vocab.json", "merges.txt")
    vocab = GOLDEN.json("checkpoint/vocab.json")
    vocab["<|im_start|>"] = 512
    (tmp_path / "vocab.json").write_text(json.dumps(vocab))
    tokenizer = BagelTokenizer.from_folder(tmp_path)
    assert tokenizer.bos == 512
    assert tokenizer.encode("a<|im_start|>b") == [64, 512, 65]
    assert len(tokenizer) == 516


def test_truncation_and_padding_are_off(tmp_path: Path) -> None:
    whole = Tokenizer.from_file(str(GOLDEN.checkpoint / "tokenizer.json"))
    whole.enable_truncation(4)
    whole.enable_padding(length=32)
    whole.save(str(tmp_path / "tokenizer.json"))
    example = EXAMPLES[3]
    assert BagelTokenizer.from_folder(tmp_path).encode(example["text"]) == example["ids"]


def test_encode_bad_text(tokenizer: BagelTokenizer) -> None:
    with pytest.raises(TypeError, match="text is a list; expected a str"):
        tokenizer.encode(["a"])  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"text holds a lone surrogate, '\\ud83e' at position 1"):
        tokenizer.encode("a\ud83e")


def test_from_folder_no_folder(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"nowhere' is not a folder; expected"):
        BagelTokenizer.from_folder(tmp_path / "nowhere")


def test_from_folder_no_files(tmp_path: Path) -> None:
    copy(tmp_path, "vocab.json")
    with pytest.raises(FileNotFoundError, match=r"no tokenizer\.json, and merges\.txt is missing"):
        BagelTokenizer.from_folder(tmp_path)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("tokenizer.json", "{}", r"tokenizer\.json is not a tokenizer of the 'tokenizers' library"),
        ("vocab.json", "[]", r"vocab\.json and .*merges\.txt are no byte-level BPE vocabulary"),
        ("tokenizer_config.json", "[]", r"tokenizer_config\.json does not list added tokens"),
        (
            "tokenizer_config.json",
            '{"added_tokens_decoder": {"512": {}}}',
            r"tokenizer_config\.json does not list added tokens.*KeyError\('content'\)",
        ),
        ("added_tokens.json", '{"<x>": "y"}', r"added_tokens\.json does not list added tokens"),
        ("added_tokens.json", '{"<x>": 3}', r"id 3 belongs to both '\$' and '<x>'"),
        ("added_tokens.json", '{"th": 3}', r"'th' has id 3, but vocab\.json gives it 256"),
    ],
)
def test_from_folder_bad_file(tmp_path: Path, name: str, content: str, message: str) -> None:
    copy(tmp_path, "vocab.json", "merges.txt")
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=message):
        BagelTokenizer.from_folder(tmp_path)
