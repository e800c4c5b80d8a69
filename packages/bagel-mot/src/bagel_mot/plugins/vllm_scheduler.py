"""vLLM's scheduler, except that a prefill step never ends inside a picture.

A picture's rows attend to all of it, so its first rows need the last ones: the whole picture must
be in one step. vLLM's `disable_chunked_mm_input` nearly says so, but looks only at pictures that
begin after the step's first token; one that begins with it (at the start of a prompt, or where
the step before was cut short to spare it) is split when other requests have used up the budget.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.scheduler import Scheduler

from bagel_mot.plugins.vllm_config import bagel_config, takes_pictures
from bagel_mot.plugins.vllm_pictures import most_picture_tokens


def tokens_without_split(pictures: Iterable[tuple[int, int]], computed: int, tokens: int) -> int:
    """How many of `tokens` can be computed next without ending inside a picture.

    Args:
        pictures: (first, number) of each picture's tokens.
        computed: tokens computed so far. May end inside a picture, after a hit in the prefix
            cache: those were computed together with the whole picture, in another request.
        tokens: how many the budget allows.

    Returns:
        `tokens`, or fewer; 0 if the next picture has to wait for a step with more room.
    """
    for first, number in pictures:
        if first < computed + tokens < first + number:
            return max(0, first - computed)
    return tokens


class _WholePictures(Scheduler):
    def _try_schedule_encoder_inputs(
        self,
        request: Any,
        num_computed_tokens: int,
        num_new_tokens: int,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        spans = ((f.mm_position.offset, f.mm_position.length) for f in request.mm_features)
        tokens = tokens_without_split(spans, num_computed_tokens, num_new_tokens)
        return super()._try_schedule_encoder_inputs(
            request, num_computed_tokens, tokens, *args, **kwargs
        )


class _AsyncWholePictures(_WholePictures, AsyncScheduler):
    pass


def build_scheduler(*, vllm_config: Any, **kwargs: Any) -> Scheduler:
    """The scheduler of an engine; vLLM calls this as it would a class.

    Raises:
        ValueError: a limit is so low that a picture could never be scheduled.
    """
    config, model = vllm_config.scheduler_config, vllm_config.model_config
    kind = _AsyncWholePictures if config.async_scheduling else _WholePictures
    scheduler = kind(vllm_config=vllm_config, **kwargs)
    if takes_pictures(vllm_config):
        check_limits(
            most_picture_tokens(bagel_config(model), model.max_model_len),
            max_num_scheduled_tokens=scheduler.max_num_scheduled_tokens,
            long_prefill_token_threshold=config.long_prefill_token_threshold,
        )
    return scheduler


def check_limits(needed: int, **limits: int) -> None:
    """Every limit on a step's tokens (0 for none) leaves room for a picture of `needed` tokens.

    Raises:
        ValueError: naming the first that does not.
    """
    for name, limit in limits.items():
        if 0 < limit < needed:
            raise ValueError(
                f"{name} is {limit}, but a picture takes up to {needed} tokens, which have to be "
                "computed in one step; raise it"
            )
