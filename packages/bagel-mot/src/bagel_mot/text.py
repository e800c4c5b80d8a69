"""Generating text from a context, greedily or by sampling."""

from __future__ import annotations

from collections.abc import Callable

import torch

from bagel_mot.context import Context, append_text
from bagel_mot.model.bagel import Bagel
from bagel_mot.parallel import ALONE, Parallel
from bagel_mot.tokenizer import BagelTokenizer


@torch.no_grad()
def generate_text(
    model: Bagel,
    tokenizer: BagelTokenizer,
    context: Context,
    *,
    max_tokens: int,
    temperature: float | None = None,
    generator: torch.Generator | None = None,
    parallel: Parallel = ALONE,
    on_token: Callable[[int], None] | None = None,
    on_logits: Callable[[torch.Tensor], None] | None = None,
) -> list[int]:
    """Continue a context with text. The context itself stays as it is.

    Args:
        max_tokens: the most steps to take.
        temperature: None decodes greedily; otherwise tokens are drawn from
            softmax(logits / temperature).
        generator: CPU generator to draw with.
        parallel: this process among others, which write the same text.
        on_token: called with each chosen token; an exception of its ends the generation.
        on_logits: called with each step's logits, (1, vocabulary) float32.

    Returns:
        The tokens that were fed: the start token, then all chosen ones but the last.
        `tokenizer.answer` makes a string of them.
    """
    fed: list[int] = []
    token = tokenizer.bos
    for _ in range(max_tokens):
        fed.append(token)
        context, hidden = append_text(model, context, [token])
        logits = model.logits(hidden)
        if on_logits is not None:
            on_logits(logits)
        token = parallel.agree(_choose(logits[0], temperature, generator))
        if on_token is not None:
            on_token(token)
        if token == tokenizer.eos:
            break
    return fed


def _choose(
    logits: torch.Tensor, temperature: float | None, generator: torch.Generator | None
) -> int:
    if temperature is None:
        return int(logits.argmax())
    probabilities = torch.softmax(logits / temperature, dim=-1).cpu()
    return int(torch.multinomial(probabilities, 1, generator=generator))
