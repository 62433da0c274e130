"""What the host knows of a batch's sequences, and of the programs that its device has been asked to run."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import numpy as np

from qwen3_moe_jax.core.batch import FinishReason, Progress, TokenScore
from qwen3_moe_jax.core.errors import ContextOverflowError
from qwen3_moe_jax.jax_backend.generate import StepResult
from qwen3_moe_jax.jax_backend.token_scores import TokenScores, host_scores


@dataclass
class Written:
    """What the host knows of a slot's sequence: tokens, at most, those in the cache, how it is sampled
    (``token_choice.work_for``), how many rivals of each token are wanted, how it ended, and how many tokens
    the device has been asked for beyond ``length``."""

    length: int
    limit: int
    stop_ids: frozenset[int]
    work: int
    filled: int = 0
    is_masked: bool = False
    top: int | None = None
    is_held: bool = False
    finish_reason: FinishReason | None = None
    asked: int = 0

    @property
    def is_waiting(self) -> bool:
        """Whether some of its prompt has to be read before it can be written."""
        return self.finish_reason is None and self.filled < self.length - 1

    @property
    def is_ready(self) -> bool:
        return self.finish_reason is None and not self.is_waiting and not self.is_held

    @property
    def is_writable(self) -> bool:
        """Whether it is going to have room for a token after all that the device has been asked for."""
        return self.is_ready and self.length + self.asked < self.limit

    def took(self, result: StepResult, slot: int) -> Progress | None:
        """Notes what a program has written of it, in ``slot``, and says it; None for nothing."""
        added = int(result.length[slot]) - self.length
        if not (added or result.finished[slot]):
            return None
        self.length += added
        self.is_held = self.is_masked
        self.filled = self.length - 1
        tokens = result.tokens[slot, :added].tolist()
        if result.nonfinite[slot]:
            self.finish_reason = "nonfinite"
        elif result.finished[slot]:
            is_stopped = tokens[-1] in self.stop_ids
            self.finish_reason = "stop" if is_stopped else "length"
            tokens = tokens[:-1] if is_stopped else tokens
        return Progress(
            slot, tokens, self.finish_reason, scores_of(result.scores, slot, len(tokens), self.top)
        )


def prompt_arrays(
    token_ids: Sequence[int],
    max_tokens: int | None,
    stop_ids: Collection[int],
    capacity: int,
    vocab_size: int,
) -> tuple[np.ndarray, np.ndarray]:
    """A prompt padded to int32 [capacity], and the stop tokens as bool [vocab_size].

    Raises:
      ContextOverflowError, ValueError: as ``Batch.admit``.
    """
    count = len(token_ids)
    if not count:
        raise ValueError("the prompt is empty: it needs at least one token")
    if max_tokens is not None and max_tokens < 1:
        raise ValueError(f"max_tokens is {max_tokens}; it must be at least 1")
    if count >= capacity:
        raise ContextOverflowError(count, capacity)
    tokens, is_stop = np.zeros(capacity, np.int32), np.zeros(vocab_size, bool)
    stops = np.asarray(sorted(stop_ids), np.int64)
    for ids in (np.asarray(token_ids), stops):
        outside = ids[(ids < 0) | (ids >= vocab_size)]
        if outside.size:
            raise ValueError(f"token id {outside[0]} is not in 0..{vocab_size - 1}")
    tokens[:count], is_stop[stops] = token_ids, True
    return tokens, is_stop


@dataclass(frozen=True)
class Asked:
    """A program that the device has been asked to run: its result, the sequences that there were, how many
    tokens some of them may get, and whether it writes alone and so may be waited for later."""

    result: StepResult
    sequences: dict[int, Written]
    tokens: dict[int, int]
    is_decode: bool


def merged(progress: Sequence[Progress]) -> list[Progress]:
    """One entry for each slot, in order."""
    found: dict[int, Progress] = {}
    for p in progress:
        if (old := found.get(p.slot)) is not None:
            scores = None if old.scores is None or p.scores is None else old.scores + p.scores
            found[p.slot] = Progress(p.slot, old.tokens + p.tokens, p.finish_reason, scores)
        else:
            found[p.slot] = p
    return [found[slot] for slot in sorted(found)]


def scores_of(found: TokenScores | None, slot: int, count: int, top: int | None) -> list[TokenScore] | None:
    """The first ``count`` scores of a slot with ``top`` rivals each, for the host."""
    if found is None or top is None:
        return None
    arrays = (found.own[slot, :count], found.ids[slot, :count, :top], found.values[slot, :count, :top])
    return host_scores(*(np.asarray(x) for x in arrays))
