"""One sequence at a time as a batch of one slot: for backends that have no batches (wgpu, reference)."""

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass

from qwen3_moe_jax.core.errors import BatchFullError, ContextOverflowError, NumericalError
from qwen3_moe_jax.core.runner import Runner
from qwen3_moe_jax.core.sampling import Sampling


@dataclass(frozen=True)
class SingleProgress:
    """As ``batching.Progress``."""

    slot: int
    tokens: list[int]
    finish_reason: str | None


class SingleBatch:
    """``Runner.stream`` behind the part of ``batching.Batch`` that the scheduler needs."""

    slots = 1
    is_whole = True

    def __init__(self, runner: Runner):
        self.capacity = runner.max_context
        self._runner = runner
        self._stream: Iterator[int] | None = None
        self._left = 0
        self._has_begun = False

    @property
    def free_slots(self) -> int:
        return int(self._stream is None)

    @property
    def waiting(self) -> int:
        return int(self._stream is not None and not self._has_begun)

    def admit(
        self,
        token_ids: Sequence[int],
        *,
        sampling: Sampling | None = None,
        max_tokens: int | None = None,
        stop_ids: Collection[int] = (),
    ) -> int:
        """As ``Batch.admit``."""
        if self._stream is not None:
            raise BatchFullError(1)
        room = self.capacity - len(token_ids)
        if room < 1:
            raise ContextOverflowError(len(token_ids), self.capacity)
        self._left = min(max_tokens or room, room)
        self._stream = self._runner.stream(
            token_ids, max_tokens=self._left, sampling=sampling or Sampling(), stop_ids=stop_ids
        )
        self._has_begun = False
        return 0

    def free(self, slot: int) -> None:
        """As ``Batch.free``."""
        close = getattr(self._stream, "close", None)
        self._stream = None
        if close is not None:
            close()

    def step(self, tokens: int = 1, **_: int) -> list[SingleProgress]:
        """One token, whatever is asked for."""
        if self._stream is None:
            return []
        self._has_begun = True
        try:
            token = next(self._stream, None)
        except NumericalError:
            return [SingleProgress(0, [], "nonfinite")]
        if token is None:
            return [SingleProgress(0, [], "stop")]
        self._left -= 1
        return [SingleProgress(0, [token], None if self._left else "length")]
