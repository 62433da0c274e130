"""One sequence at a time as a batch of one slot: for backends that have no batches (wgpu, reference)."""

from collections.abc import Collection, Generator, Sequence
from typing import Any, NoReturn

from qwen3_moe_jax.core.batch import Progress
from qwen3_moe_jax.core.errors import (
    BackendUnavailableError,
    BatchFullError,
    ContextOverflowError,
    NumericalError,
)
from qwen3_moe_jax.core.runner import Runner
from qwen3_moe_jax.core.sampling import Sampling


class SingleBatch:
    """``Runner.stream`` as a ``core.batch.Batch`` of one slot, without rows and masks."""

    slots = 1
    is_whole = True
    is_held = False
    read_tokens = 0

    def __init__(self, runner: Runner, context: int):
        """``context``: tokens that a sequence may have; the runner's own, if that is less."""
        self.capacity = min(context, runner.max_context)
        self._runner = runner
        self._stream: Generator[int] | None = None
        self._left = 0
        self._has_begun = False

    @property
    def free_slots(self) -> int:
        return int(self._stream is None)

    @property
    def waiting(self) -> int:
        return int(self._stream is not None and not self._has_begun)

    @property
    def running(self) -> int:
        return int(self._stream is not None)

    def room(self, slot: int) -> int:
        """As ``Batch.room``."""
        return self.capacity

    def make_programs(self) -> None:
        """Does nothing: the runner has its programs; see ``Batch.make_programs``."""

    def load_programs(self) -> None:
        """Does nothing, for the same reason."""

    def use_ready_programs(self) -> None:
        """Does nothing, for the same reason."""

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
        """As ``Batch.admit``; raises BackendUnavailableError for what it does not have."""
        if filled or written or mask is not None or top_logprobs is not None:
            self._refuse()
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
        stream, self._stream = self._stream, None
        if stream is not None:
            stream.close()

    def step(self, tokens: int = 1, *, prompt_tokens: int = 2048, ahead: int = 0) -> list[Progress]:
        """One token, whatever is asked for."""
        if self._stream is None:
            return []
        self._has_begun = True
        try:
            token = next(self._stream, None)
        except NumericalError:
            return [Progress(0, [], "nonfinite")]
        if token is None:
            return [Progress(0, [], "stop")]
        self._left -= 1
        return [Progress(0, [token], None if self._left else "length")]

    def allow(self, slot: int, mask: bytes) -> None:
        """Raises BackendUnavailableError, as what follows: see ``Capabilities.open_batch``."""
        self._refuse()

    def row_length(self, slot: int) -> int:
        self._refuse()

    def row_nbytes(self, length: int) -> int:
        self._refuse()

    def copy_row(self, source: int, target: int, length: int) -> None:
        self._refuse()

    def save_row(self, slot: int, length: int) -> Any:
        self._refuse()

    def load_row(self, slot: int, saved: Any) -> None:
        self._refuse()

    def _refuse(self) -> NoReturn:
        raise BackendUnavailableError(f"the {self._runner.name} backend has no rows and masks of slots")
