"""The methods of ``Runner`` that take several sequences, on a backend that runs one at a time."""

from collections.abc import Collection, Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from qwen3_moe_jax.core.batch import RowBatch, TokenScore
from qwen3_moe_jax.core.errors import (
    BackendUnavailableError,
    NumericalError,
)
from qwen3_moe_jax.core.runner import (
    Capabilities,
    Compilation,
    ForwardShape,
    Generated,
    IsOver,
    Platform,
    Runner,
    TokenIds,
)
from qwen3_moe_jax.core.runner_arguments import check_open, checked_text, per_prompt
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

    def open_batch(
        self: Runner, slots: int, *, context: int | None = None, is_invariant: bool = False
    ) -> RowBatch:
        """Raises BackendUnavailableError; see ``Runner.open_batch``."""
        check_open(self)
        raise BackendUnavailableError(
            f"the {self.name} backend runs one sequence at a time: batches need backend='jax'"
        )

    def dequantized(self: Runner, path: str, tile: int, expert: int | None = None) -> NDArray[np.float32]:
        """Raises BackendUnavailableError; see ``Runner.dequantized``."""
        check_open(self)
        raise BackendUnavailableError(f"the {self.name} backend does not show its unpacked weights")

    def compilation(self) -> Compilation | None:
        """None: programs were compiled when the model was loaded; see ``Runner.compilation``."""
        return None

    def expect(self, shapes: Sequence[ForwardShape]) -> None:
        """Does nothing, as there is nothing to compile; see ``Runner.expect``."""

    def token_scores(self: Runner, token_ids: TokenIds, *, top: int, first: int = 1) -> list[TokenScore]:
        """From the logits of all positions; see ``Runner.token_scores``."""
        tokens = checked_text(self, token_ids, first)
        logits = self.forward(tokens).logits[first - 1 : -1].astype(np.float64)
        peak = logits.max(axis=-1, keepdims=True)
        logits -= peak + np.log(np.exp(logits - peak).sum(axis=-1, keepdims=True))
        own = logits[np.arange(len(logits)), tokens[first:]]
        ids = (-logits).argsort(axis=-1, kind="stable")[:, :top]
        values = np.take_along_axis(logits, ids, axis=-1)
        rivals = [list(zip(*row, strict=True)) for row in zip(ids.tolist(), values.tolist(), strict=True)]
        return [TokenScore(*score) for score in zip(own.tolist(), rivals, strict=True)]

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


def _written(tokens: Iterator[int], maximum: int, number: int, is_over: IsOver | None) -> Generated:
    """Reads a stream to its end, or until ``is_over``."""
    result = Generated(finish_reason="stop")
    try:
        for token in tokens:
            result.tokens.append(token)
            if is_over is not None and is_over(number, [token]):
                return result
    except NumericalError:
        return Generated(result.tokens, "nonfinite")
    if len(result.tokens) == maximum:
        result.finish_reason = "length"
    return result
