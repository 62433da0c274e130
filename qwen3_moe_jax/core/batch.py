"""Slots for sequences that share every forward pass: the protocol, and what a step says of each sequence."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, Protocol

from qwen3_moe_jax.core.sampling import Sampling

FinishReason = Literal["stop", "length", "nonfinite"]
"""A stop token (or what the caller took for one); max_tokens or the context; logits that are not finite."""


class TokenScore(NamedTuple):
    """Of a token that was written.

    Attributes:
      logprob: its log-probability under the model's own logits: before masks, penalties and temperature.
      top: the likeliest tokens and their log-probabilities, best first.
    """

    logprob: float
    top: list[tuple[int, float]]


@dataclass(frozen=True)
class Progress:
    """What a step did for one sequence.

    Attributes:
      slot: its slot.
      tokens: the new tokens, without a stop token.
      finish_reason: why it ended, or None while it is active.
      scores: of ``tokens``, where they were asked for.
    """

    slot: int
    tokens: list[int]
    finish_reason: FinishReason | None
    scores: list[TokenScore] | None = None


class Batch(Protocol):
    """Slots for sequences that share every forward pass (``jax_backend.batching.Batch``)."""

    @property
    def slots(self) -> int:
        """How many sequences it holds."""
        ...

    @property
    def capacity(self) -> int:
        """Tokens that a sequence may have, prompt and output."""
        ...

    @property
    def free_slots(self) -> int:
        """How many sequences could be admitted now."""
        ...

    @property
    def waiting(self) -> int:
        """How many sequences have prompts that are not read to their end."""
        ...

    @property
    def running(self) -> int:
        """How many sequences have not ended."""
        ...

    @property
    def read_tokens(self) -> int:
        """Of prompts, in the last step; what a chunk lacks counts."""
        ...

    def room(self, slot: int) -> int:
        """Tokens that a sequence in this slot may have: ``capacity``, or fewer where rows differ."""
        ...

    @property
    def is_whole(self) -> bool:
        """False after a step that failed and took the state with it."""
        ...

    @property
    def is_held(self) -> bool:
        """Whether a step would do nothing until ``allow`` is called."""
        ...

    def admit(
        self,
        token_ids: Sequence[int],
        *,
        sampling: Sampling | None = None,
        max_tokens: int | None = None,
        stop_ids: Collection[int] = (),
        slot: int | None = None,
        filled: int = 0,
        written: int = 0,
        mask: bytes | None = None,
        top_logprobs: int | None = None,
    ) -> int:
        """Takes a prompt into a free slot, ``filled`` of its tokens in that slot's row already; its last
        ``written`` ones are output. ``top_logprobs`` asks for ``Progress.scores``."""
        ...

    def step(self, tokens: int = 1, *, prompt_tokens: int = 2048, ahead: int = 0) -> Sequence[Progress]:
        """Continues every sequence that has not ended."""
        ...

    def free(self, slot: int) -> None:
        """Gives a slot back, at any time."""
        ...

    def allow(self, slot: int, mask: bytes) -> None:
        """Lets a sequence that was admitted with a mask write its next token, one of the mask's."""
        ...

    def make_programs(self) -> None:
        """Makes all programs that steps can need, and returns when they are there."""
        ...

    def load_programs(self) -> None:
        """Takes those programs that are on disk into memory, and returns when they are there."""
        ...

    def use_ready_programs(self) -> None:
        """Lets no later step wait for a program where a smaller one that is there does the work."""
        ...

    def row_length(self, slot: int) -> int:
        """Tokens of a slot's sequence that its row of the cache holds."""
        ...

    def row_nbytes(self, length: int) -> int:
        """Bytes that ``save_row`` takes for so many positions."""
        ...

    def copy_row(self, source: int, target: int, length: int) -> None:
        """Copies the first positions of one slot's row to a free slot's."""
        ...

    def save_row(self, slot: int, length: int) -> Any:
        """The first positions of a slot's row, in main memory."""
        ...

    def load_row(self, slot: int, saved: Any) -> None:
        """Puts what ``save_row`` gave into a free slot's row."""
        ...


class RowBatch(Batch, Protocol):
    """What ``Runner.open_batch`` gives: rows of the cache can be moved on the device."""

    @property
    def lowest_free(self) -> int | None:
        """The free slot that ``admit`` would take, or None."""
        ...

    @property
    def positions(self) -> int:
        """Positions of a row of the cache: more than ``capacity``."""
        ...

    def cut_row(self, slot: int, length: int, maximum: int | None = None) -> Any:
        """The first positions of a slot's row, on the device, for ``load_row`` of another batch."""
        ...
