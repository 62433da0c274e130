"""Requests: many through one batch, in their order, and the same ones in every process of a mesh."""

import hashlib
from collections import deque
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, replace

from qwen3_moe_jax.core.runner import Generated, IsOver
from qwen3_moe_jax.core.sampling import Sampling
from qwen3_moe_jax.jax_backend.batching import TOKENS_PER_DISPATCH, Batch
from qwen3_moe_jax.jax_backend.generate import MAX_STEPS
from qwen3_moe_jax.machine import processes

SECONDS_PER_DISPATCH = 0.06
"""Streaming asks the device for as many tokens at once as take about this long."""


@dataclass(frozen=True)
class Request:
    """What ``Batch.admit`` is asked for."""

    token_ids: Sequence[int]
    sampling: Sampling = field(default_factory=Sampling)
    max_tokens: int | None = None
    stop_ids: Collection[int] = ()

    def facts(self) -> dict[str, object]:
        """What has to be the same in every process; the seed, which nobody may have chosen, is left out."""
        return {
            "prompt": list(map(int, self.token_ids)),
            "sampling": replace(self.sampling, seed=0),
            "number of tokens": self.max_tokens,
            "stop tokens": sorted(self.stop_ids),
        }


def agreed(requests: Sequence[Request]) -> list[Request]:
    """The same requests with the seeds of process 0: a seed that each draws for itself is another one.

    Raises:
      OptionError: a process is asked for something else.
    """
    if processes.count() == 1:
        return list(requests)
    facts = [request.facts() for request in requests]
    digest = hashlib.sha256(repr(facts).encode()).hexdigest()[:16]
    processes.check_all_have({"request": digest}, what="request")
    seeds = processes.of_first("seeds", [request.sampling.seed for request in requests])
    return [
        replace(r, sampling=replace(r.sampling, seed=seed)) for r, seed in zip(requests, seeds, strict=True)
    ]


def next_count(count: int, seconds: float) -> int:
    """Tokens per dispatch after ``count`` tokens took ``seconds`` in process 0, whose clock decides."""
    own = min(count * next((n for n in (4, 2) if n * seconds < SECONDS_PER_DISPATCH), 1), MAX_STEPS)
    return processes.of_first("tokens per dispatch", own)


def lowest(count: int) -> int:
    """The lowest count of all processes."""
    return min(processes.everyones("a count", count))


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
