"""The protocol that every backend speaks: jax, wgpu and reference are runners of the whole model."""

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from qwen3_moe_jax.convert.config import Qwen3MoeConfig
from qwen3_moe_jax.core.sampling import Sampling
from qwen3_moe_jax.core.stages import StageKey


@dataclass(frozen=True)
class Forward:
    """What one forward pass over a prompt gives.

    Attributes:
      logits: float32 [T, V].
      expert_ids: int32 [L, T, X], each token's experts in every layer, most probable first.
      stages: the captured stages, each with the shape that ``stages.STAGES`` states.
    """

    logits: np.ndarray
    expert_ids: np.ndarray
    stages: dict[StageKey, np.ndarray] = field(default_factory=dict)


class Runner(Protocol):
    """A backend that holds one loaded model.

    One that runs many sequences at once also has ``generate_batch`` (``jax_runner.JaxRunner``).

    Attributes:
      name: "jax", "wgpu" or "reference".
      config: the model's hyper-parameters.
      max_context: tokens that its KV cache holds.
      forward_options: which of ``forward``'s optional arguments it takes, out of
        "layers", "chunk_sizes" and "beside".
    """

    name: str
    config: Qwen3MoeConfig
    max_context: int
    forward_options: frozenset[str]

    def describe(self) -> dict[str, object]:
        """What runs where, for the banner and for receipts.

        Keys: backend, device, compute_dtype; implementations, one name for each
        quantization type; fallbacks, a line for each part that runs on less than
        this backend's best implementation; batch_invariant, whether decoding gives a
        sequence the same bits whatever other sequences (up to 15) run in its batch.
        """
        ...

    def close(self) -> None:
        """Gives back the memory of weights and cache; the runner is of no use afterwards."""
        ...

    def forward(
        self,
        token_ids: Sequence[int],
        *,
        capture: Collection[str] = (),
        expert_ids: np.ndarray | None = None,
        layers: Sequence[int] | None = None,
        chunk_sizes: Sequence[int] = (),
        beside: Sequence[Sequence[int]] = (),
    ) -> Forward:
        """Runs the prompt from an empty cache.

        Args:
          token_ids: T token ids.
          capture: names of stages to return.
          expert_ids: int32 [L, T, X]; forces these experts (router replay). Their
            weights are still this runner's own router probabilities, renormalized.
          layers: runs only these layers, one after the other, for a quick check of
            a large model; L is then their number, and stages carry their own numbers.
          chunk_sizes: lengths of the pieces in which the prompt is put into the
            cache; (1,) takes the way of decoding. Each backend has its own default.
          beside: other sequences that run in the same batch, which has ``token_ids`` as its
            row len(beside) // 2. They are cut or padded to T tokens and take the same
            ``expert_ids``; what is returned is that of ``token_ids`` alone.

        Raises:
          ContextOverflowError: T is more than max_context.
        """
        ...

    def log_likelihoods(self, token_ids: Sequence[int], *, first: int = 1) -> np.ndarray:
        """``ln p(token_ids[i] | token_ids[:i])`` of every i from ``first`` (at least 1) on: [T - first].

        Logits are never there for all positions at once. Values are not finite where
        logits were not.

        Raises:
          ContextOverflowError: T is more than max_context.
        """
        ...

    def stream(
        self,
        token_ids: Sequence[int],
        *,
        max_tokens: int,
        sampling: Sampling,
        stop_ids: Collection[int] = (),
    ) -> Iterator[int]:
        """Yields new token ids as they come; ends after max_tokens, or before one of stop_ids.

        Raises:
          ContextOverflowError: the prompt leaves no room in the cache.
          NumericalError: logits were not finite.
        """
        ...
