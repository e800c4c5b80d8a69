"""A tokenizer for what is said about scenes, in Qwen2's files: every word is one token."""

from __future__ import annotations

import json
from pathlib import Path
from random import Random

from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers
from tokenizers.models import BPE
from tokenizers.trainers import BpeTrainer

from bagel_mot.tiny.language import texts
from bagel_mot.tokenizer import QWEN2_SPLIT, SPECIAL_TOKENS

# Qwen2's own first special token, then those that BAGEL needs.
_SPECIAL = ("<|endoftext|>", *SPECIAL_TOKENS)


def write_tokenizer(folder: Path, vocabulary: int, *, samples: int = 4000) -> None:
    """Train byte-level BPE on a sample of the language and write it.

    Writes `tokenizer.json`, `vocab.json`, `merges.txt`, `added_tokens.json` and
    `tokenizer_config.json`.

    Args:
        vocabulary: most tokens, the 256 bytes and the special ones included.
        samples: how many of each kind of text are looked at.
    """
    tokenizer = Tokenizer(BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(QWEN2_SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = BpeTrainer(
        vocab_size=vocabulary - len(_SPECIAL),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts(Random("vocabulary"), samples), trainer)
    added = [AddedToken(content, normalized=False, special=True) for content in _SPECIAL]
    tokenizer.add_special_tokens(added)
    ids = {content: tokenizer.token_to_id(content) for content in _SPECIAL}
    tokenizer.save(str(folder / "tokenizer.json"))
    tokenizer.model.save(str(folder))  # vocab.json and merges.txt
    _write(folder / "added_tokens.json", ids)
    entry = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False}
    _write(
        folder / "tokenizer_config.json",
        {
            "added_tokens_decoder": {
                str(number): {"content": content, **entry, "special": True}
                for content, number in ids.items()
            },
            "tokenizer_class": "Qwen2Tokenizer",
            "eos_token": "<|im_end|>",
            "pad_token": "<|endoftext|>",
        },
    )


def _write(file: Path, content: object) -> None:
    file.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
