"""Text to token ids and back, as the official code's Qwen2 tokenizer does it.

Byte-level BPE over NFC-normalised text. Special-token strings inside a text become special
tokens, and nothing is added to a text unless asked for (`text_segment`).
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Self

from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers
from tokenizers.models import BPE

BOS_TOKEN = "<|im_start|>"
EOS_TOKEN = "<|im_end|>"
VISION_START_TOKEN = "<|vision_start|>"
VISION_END_TOKEN = "<|vision_end|>"

# The order in which the official helper adds those that a tokenizer lacks: it decides their ids.
SPECIAL_TOKENS = (BOS_TOKEN, EOS_TOKEN, VISION_START_TOKEN, VISION_END_TOKEN)

# How Qwen2 cuts a text before BPE, one alternative a line: English contractions; letters with at
# most one leading sign or space; single digits; runs of signs; line breaks; other white space,
# whose last blank is left to the word that follows.
QWEN2_SPLIT = "|".join(
    (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)",
        r"[^\r\n\p{L}\p{N}]?\p{L}+",
        r"\p{N}",
        r" ?[^\s\p{L}\p{N}]+[\r\n]*",
        r"\s*[\r\n]+",
        r"\s+(?!\S)",
        r"\s+",
    )
)


class BagelTokenizer:
    """The tokenizer of a checkpoint folder.

    Attributes:
        bos: id of `<|im_start|>`, which opens a text.
        eos: id of `<|im_end|>`, which closes a text and stops generation.
        vision_start: id of `<|vision_start|>`, the marker before a picture's tokens.
        vision_end: id of `<|vision_end|>`, the marker after them.
    """

    bos: int
    eos: int
    vision_start: int
    vision_end: int

    def __init__(self, tokenizer: Tokenizer) -> None:
        """Wrap a tokenizer; the special tokens it lacks are added to it, after its last id."""
        # A tokenizer.json saved after training may carry both, and would cut or pad every prompt.
        tokenizer.no_truncation()
        tokenizer.no_padding()
        known = {token.content for token in tokenizer.get_added_tokens_decoder().values()}
        # One that is only a vocabulary entry keeps its id, but has to be matched inside texts.
        tokenizer.add_special_tokens(
            [
                AddedToken(content, normalized=False, special=True)
                for content in SPECIAL_TOKENS
                if content not in known
            ]
        )
        self._tokenizer = tokenizer
        self.bos, self.eos, self.vision_start, self.vision_end = (
            self._id_of(content) for content in SPECIAL_TOKENS
        )
        self._size = 1 + max(tokenizer.get_vocab(with_added_tokens=True).values())

    @classmethod
    def from_folder(cls, path: str | os.PathLike[str]) -> Self:
        """Read `tokenizer.json`, or else build the same from the older files.

        The older files are `vocab.json` and `merges.txt`, and for the added tokens
        `tokenizer_config.json` (`added_tokens_decoder`) and `added_tokens.json`, both optional.

        Raises:
            FileNotFoundError: the folder, or both sets of files, are not there.
            ValueError: a file cannot be read as what its name says.
        """
        folder = Path(path)
        if not folder.is_dir():
            raise FileNotFoundError(
                f"path {str(folder)!r} is not a folder; expected a BAGEL checkpoint folder with "
                "tokenizer.json, or vocab.json and merges.txt"
            )
        whole = folder / "tokenizer.json"
        if whole.is_file():
            try:
                tokenizer = Tokenizer.from_file(str(whole))
            except Exception as error:  # the library raises nothing more specific
                raise ValueError(
                    f"{whole} is not a tokenizer of the 'tokenizers' library: {error}; copy it "
                    "again, or remove it to use vocab.json and merges.txt"
                ) from error
            return cls(tokenizer)
        return cls(_build_qwen2(folder))

    @classmethod
    def of_model(cls, path: str | os.PathLike[str], vocab_size: int) -> Self:
        """As `from_folder`, for a model whose embedding has `vocab_size` rows.

        Raises:
            ValueError: those are too few, too.
        """
        tokenizer = cls.from_folder(path)
        if len(tokenizer) > vocab_size:
            raise ValueError(
                f"{path}: the tokenizer has {len(tokenizer)} tokens but the embedding only "
                f"{vocab_size} rows; the files belong to different models"
            )
        return tokenizer

    def __len__(self) -> int:
        """Rows an embedding table needs for every token: the largest id plus one.

        A model's `vocab_size` may be larger, never smaller.
        """
        return self._size

    def encode(self, text: str) -> list[int]:
        """Token ids of a text, with nothing added before or after it.

        Raises:
            TypeError: `text` is not a string.
            ValueError: `text` holds half of a surrogate pair, which is no character.
        """
        if not isinstance(text, str):
            raise TypeError(f"text is a {type(text).__name__}; expected a str")
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise ValueError(
                f"text holds a lone surrogate, {text[error.start]!r} at position {error.start}; "
                "expected text that can be written as UTF-8"
            ) from error
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=False).ids
        return ids

    def decode(self, ids: Iterable[int]) -> str:
        """The text of token ids; special tokens stay in it.

        Bytes that are not valid UTF-8 become U+FFFD. Ids above the last token (a model's table is
        larger than the vocabulary) have no text and are left out.
        """
        text: str = self._tokenizer.decode([int(token) for token in ids], skip_special_tokens=False)
        return text

    def text_segment(self, text: str) -> list[int]:
        """A text as the model's context takes it: `bos`, the ids of the text, `eos`."""
        return [self.bos, *self.encode(text), self.eos]

    def answer(self, ids: Sequence[int]) -> str:
        """The answer in a generated sequence, as the official code cuts it out.

        Args:
            ids: the tokens that were fed, the start token first.

        Returns:
            What lies between the first and a possible second `<|im_start|>`, in the decoded text
            up to a first `<|im_end|>`. Other special tokens stay.

        Raises:
            ValueError: there is no `<|im_start|>` before the first `<|im_end|>`.
        """
        # Cut in the text and not in the ids: plain tokens that spell a special one count as well.
        spoken = self.decode(ids).split(EOS_TOKEN, 1)[0]
        parts = spoken.split(BOS_TOKEN, 2)
        if len(parts) == 1:
            raise ValueError(
                f"ids decode to {spoken!r} up to the end token; expected {BOS_TOKEN!r} "
                f"(id {self.bos}) first, the token that generation starts from"
            )
        return parts[1]

    def _id_of(self, content: str) -> int:
        token = self._tokenizer.token_to_id(content)
        if token is None:
            raise ValueError(f"the tokenizer refused to add the special token {content!r}")
        return int(token)


def _build_qwen2(folder: Path) -> Tokenizer:
    vocab_file, merges_file = folder / "vocab.json", folder / "merges.txt"
    missing = [file.name for file in (vocab_file, merges_file) if not file.is_file()]
    if missing:
        raise FileNotFoundError(
            f"{folder} has no tokenizer.json, and {' and '.join(missing)} is missing too; "
            "expected the first, or both vocab.json and merges.txt"
        )
    try:
        vocab, merges = BPE.read_file(str(vocab_file), str(merges_file))
    except Exception as error:  # the library raises nothing more specific
        raise ValueError(
            f"{vocab_file} and {merges_file} are no byte-level BPE vocabulary: {error}"
        ) from error
    added = _read_added_tokens(folder)
    ids = dict(vocab)
    for token, number in added:
        if ids.setdefault(token.content, number) != number:
            raise ValueError(
                f"the added token {token.content!r} has id {number}, but vocab.json gives it "
                f"{ids[token.content]}; expected one id"
            )
    if len(set(ids.values())) != len(ids):
        taken: dict[int, str] = {}
        for content, number in ids.items():
            other = taken.setdefault(number, content)
            if other != content:
                raise ValueError(
                    f"{folder}: id {number} belongs to both {other!r} and {content!r}; expected "
                    "ids of their own for added tokens"
                )
    # Added tokens go into the vocabulary too: only so does the library keep ids that leave gaps.
    tokenizer = Tokenizer(BPE(vocab=ids, merges=merges))
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(QWEN2_SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_tokens([token for token, _ in added])
    return tokenizer


def _read_added_tokens(folder: Path) -> list[tuple[AddedToken, int]]:
    """The added tokens with their ids, in the order of these."""
    found: dict[str, tuple[AddedToken, int]] = {}
    file = folder / "tokenizer_config.json"
    try:
        for number, entry in _read_object(file).get("added_tokens_decoder", {}).items():
            token = AddedToken(
                entry["content"],
                single_word=entry.get("single_word", False),
                lstrip=entry.get("lstrip", False),
                rstrip=entry.get("rstrip", False),
                normalized=entry.get("normalized", False),
                special=entry.get("special", True),
            )
            found[token.content] = (token, int(number))
        file = folder / "added_tokens.json"
        for content, number in _read_object(file).items():
            token = AddedToken(content, normalized=False, special=True)
            found.setdefault(content, (token, int(number)))
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(
            f"{file} does not list added tokens as Qwen2's files do: {error!r}; expected "
            "id: {'content': text, ...} in tokenizer_config.json's 'added_tokens_decoder', and "
            "text: id in added_tokens.json"
        ) from error
    return sorted(found.values(), key=lambda pair: pair[1])


def _read_object(file: Path) -> dict[str, Any]:
    """A JSON object, empty where there is no such file."""
    if not file.is_file():
        return {}
    content = json.loads(file.read_text(encoding="utf-8"))
    if not isinstance(content, dict):
        raise TypeError(f"a JSON {type(content).__name__}, not an object")
    return content
