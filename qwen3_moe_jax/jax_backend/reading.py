"""How a step of a batch reads prompts: a chunk of how many of them, by which program."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from qwen3_moe_jax.jax_backend import generate
from qwen3_moe_jax.jax_backend.decode_path import Decoder
from qwen3_moe_jax.jax_backend.generate import PREFILL_CHUNKS, DecodeState, StepResult, chunk_lengths
from qwen3_moe_jax.jax_backend.params import Params
from qwen3_moe_jax.jax_backend.step_sizes import prompt_counts, rows_beside


class Reader:
    """Reads the prompts of one batch."""

    def __init__(self, decoder: Decoder, params: Params, slots: int):
        self._network: tuple[Any, ...] = decoder, params
        self._has_kernel = decoder.has_kernel
        self._rows = rows_beside(slots, decoder.has_kernel)
        self._only_ready = False
        self._ready: set[tuple[int, int, bool]] = set()

    def use_ready_programs(self) -> None:
        """From now on reads prompts one by one where the program for several is not in memory."""
        self._only_ready = True

    def close(self) -> None:
        """Lets go of the weights."""
        self._network = ()

    def choose(
        self, state: DecodeState, remaining: Sequence[int], maximum: int, *, is_scored: bool
    ) -> tuple[int, int]:
        """The length of a step's chunks and the number of prompts.

        Args:
          state: of the batch.
          remaining: tokens that are left of each prompt, that of the oldest first.
          maximum: about how many tokens the step may read.
          is_scored: as for ``generate.prefill``.
        """
        sizes = [size for size in PREFILL_CHUNKS if size <= maximum] or PREFILL_CHUNKS[:1]
        chunk = chunk_lengths(remaining[0], sizes)[0]
        counts = prompt_counts(len(remaining), chunk, maximum, has_kernel=self._has_kernel)
        return chunk, max(n for n in counts if n == 1 or self._may_read(state, chunk, n, is_scored))

    def read(
        self, state: DecodeState, slots: Sequence[int], chunk: int, *, is_scored: bool
    ) -> tuple[DecodeState, StepResult]:
        """Asks the device to read a chunk of these slots' prompts; ``state`` is used up."""
        numbers = np.asarray(slots, np.int32)
        return generate.prefill(*self._network, state, numbers, **self._options(chunk, is_scored))

    def _options(self, chunk: int, is_scored: bool) -> dict[str, Any]:
        return {"chunk": chunk, "rows": self._rows, "scored": is_scored}

    def _may_read(self, state: DecodeState, chunk: int, count: int, is_scored: bool) -> bool:
        wanted = chunk, count, is_scored
        if self._only_ready and wanted not in self._ready:
            slots = np.arange(count, dtype=np.int32)
            if not generate.prefill.is_ready(*self._network, state, slots, **self._options(chunk, is_scored)):
                return False
            self._ready.add(wanted)
        return True
