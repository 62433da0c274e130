"""Many requests through one batch, in their order: what ``generate_batch`` does."""

from collections import deque
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

from qwen3_moe_jax.core.runner import Generated, IsOver
from qwen3_moe_jax.core.sampling import Sampling
from qwen3_moe_jax.jax_backend.batching import TOKENS_PER_DISPATCH, Batch


@dataclass(frozen=True)
class Request:
    """What ``Batch.admit`` is asked for."""

    token_ids: Sequence[int]
    sampling: Sampling = field(default_factory=Sampling)
    max_tokens: int | None = None
    stop_ids: Collection[int] = ()


def run_all(batch: Batch, requests: Sequence[Request], is_over: IsOver | None = None) -> list[Generated]:
    """Runs every request, in their order as slots get free.

    Raises:
      ContextOverflowError, ValueError: a request that ``Batch.admit`` does not take.
    """
    waiting, running = deque(enumerate(requests)), {}
    results = [Generated() for _ in requests]
    tokens = 1
    while waiting or running:
        while waiting and batch.free_slots:
            number, r = waiting.popleft()
            slot = batch.admit(r.token_ids, sampling=r.sampling, max_tokens=r.max_tokens, stop_ids=r.stop_ids)
            running[slot] = number
        for progress in batch.step(tokens, ahead=0 if waiting else TOKENS_PER_DISPATCH):
            number = running[progress.slot]
            result = results[number]
            result.tokens += progress.tokens
            result.finish_reason = progress.finish_reason
            if is_over is not None and is_over(number, progress.tokens):
                result.finish_reason = "stop"
            if result.finish_reason:
                batch.free(progress.slot)
                del running[progress.slot]
        tokens = TOKENS_PER_DISPATCH // 2 if waiting else TOKENS_PER_DISPATCH  # as a server's scheduler does
    return results


def shared_tokens(held: Sequence[int], tokens: Sequence[int]) -> int:
    """How many tokens of a prompt a row holds from its beginning: not the last, which is the first step's."""
    pairs = zip(held, tokens[:-1], strict=False)
    return next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(held), len(tokens) - 1))
