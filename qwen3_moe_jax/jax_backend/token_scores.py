"""Log-probabilities of written tokens and of their likeliest rivals, on the device that chooses them."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np

import qwen3_moe_jax.kernels_pallas as ops
from qwen3_moe_jax.core.batch import TokenScore
from qwen3_moe_jax.jax_backend.trees import tree_dataclass

MAX_TOP = 20
"""Rivals of a token that are known; a request may ask for fewer."""


@tree_dataclass
class TokenScores:
    """Scores of tokens at some places [...].

    Attributes:
      own: float32 [...], the token's log-probability: of the model's own logits, before masks, penalties and
        temperature.
      ids: int32 [..., MAX_TOP], the likeliest tokens, best first, the lowest id first among equals.
      values: float32 [..., MAX_TOP], their log-probabilities.
    """

    own: jax.Array
    ids: jax.Array
    values: jax.Array

    @classmethod
    def empty(cls, *shape: int, top: int) -> "TokenScores":
        """Zeros; ``top``: min(MAX_TOP, vocabulary)."""
        return cls(
            jnp.zeros(shape, jnp.float32),
            jnp.zeros((*shape, top), jnp.int32),
            jnp.zeros((*shape, top), jnp.float32),
        )

    @classmethod
    def of(cls, logits: jax.Array, tokens: jax.Array) -> "TokenScores":
        """Of one token each, int32 [R], under logits [R, V]."""
        total = jax.nn.logsumexp(logits, axis=-1, keepdims=True)
        own = jnp.take_along_axis(logits, tokens[:, None], axis=-1) - total
        values, ids = ops.top_k(logits, min(MAX_TOP, logits.shape[-1]))
        return cls(own[:, 0], ids.astype(jnp.int32), values - total)

    def put(self, index: jax.Array, new: "TokenScores") -> "TokenScores":
        """With ``new`` at the index ``index`` of the first axis; what is out of range is dropped."""
        return jax.tree.map(lambda all_, one: all_.at[index].set(one, mode="drop"), self, new)

    def moved(self) -> "TokenScores":
        """With the first two axes exchanged."""
        swap = lambda x: jnp.swapaxes(x, 0, 1)
        return replace(self, own=swap(self.own), ids=swap(self.ids), values=swap(self.values))


def host_scores(own: np.ndarray, ids: np.ndarray, values: np.ndarray) -> list[TokenScore]:
    """Arrays [T], [T, n] and [T, n] as plain values."""
    rivals = [
        [(int(i), float(v)) for i, v in zip(*row, strict=True)] for row in zip(ids, values, strict=True)
    ]
    return [TokenScore(float(one), others) for one, others in zip(own, rivals, strict=True)]
