"""The methods of ``Runner`` that take several sequences, on a backend that runs one at a time."""

from collections.abc import Collection, Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from qwen3_moe_jax.core.errors import (
    BackendUnavailableError,
    NumericalError,
)
from qwen3_moe_jax.core.runner import Batch, Capabilities, Generated, IsOver, Platform, Runner
from qwen3_moe_jax.core.runner_arguments import check_open, per_prompt
from qwen3_moe_jax.core.sampling import Sampling


class OneAtATime:
    """The methods of ``Runner`` for several sequences, on a backend that runs one at a time."""

    capabilities = Capabilities()
    platform: Platform = "cpu"
    reused_tokens = 0

    @property
    def token_nbytes(self: Runner) -> int:
        """Bytes of one token's keys and values."""
        return self.cache_nbytes // self.max_context

    def free_nbytes(self) -> int | None:
        """None: the cache was made with the weights; see ``Runner.free_nbytes``."""
        return None

    def set_max_context(self: Runner, tokens: int) -> None:
        """Raises BackendUnavailableError; see ``Runner.set_max_context``."""
        check_open(self)
        raise BackendUnavailableError(f"the {self.name} backend makes its cache when it loads a model")

    def open_batch(self: Runner, slots: int, *, context: int | None = None) -> Batch:
        """Raises BackendUnavailableError; see ``Runner.open_batch``."""
        check_open(self)
        raise BackendUnavailableError(
            f"the {self.name} backend runs one sequence at a time: batches need backend='jax'"
        )

    def dequantized(self: Runner, path: str, tile: int, expert: int | None = None) -> NDArray[np.float32]:
        """Raises BackendUnavailableError; see ``Runner.dequantized``."""
        check_open(self)
        raise BackendUnavailableError(f"the {self.name} backend does not show its unpacked weights")

    def memory(self) -> dict[str, int] | None:
        """None: nobody tells; see ``Runner.memory``."""
        return None

    def generate_batch(
        self: Runner,
        prompts: Sequence[Sequence[int]],
        *,
        max_tokens: int | Sequence[int],
        sampling: Sampling | Sequence[Sampling],
        stop_ids: Collection[int] = (),
        slots: int | None = None,
        is_over: IsOver | None = None,
    ) -> list[Generated]:
        """One prompt after the other; see ``Runner.generate_batch``."""
        check_open(self)
        found: list[Generated] = []
        for number, (prompt, (limit, its_sampling)) in enumerate(
            zip(prompts, per_prompt(len(prompts), max_tokens, sampling), strict=True)
        ):
            tokens = self.stream(prompt, max_tokens=limit, sampling=its_sampling, stop_ids=stop_ids)
            room = min(limit, self.max_context - len(prompt))
            found.append(_written(tokens, room, number, is_over))
        return found


def _written(tokens: Iterator[int], most: int, number: int, is_over: IsOver | None) -> Generated:
    """Reads a stream to its end, or until ``is_over``."""
    result = Generated(finish_reason="stop")
    try:
        for token in tokens:
            result.tokens.append(token)
            if is_over is not None and is_over(number, [token]):
                return result
    except NumericalError:
        return Generated(result.tokens, "nonfinite")
    if len(result.tokens) == most:
        result.finish_reason = "length"
    return result
