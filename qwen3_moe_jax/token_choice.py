"""Sampling on the device: the meaning of ``Sampling`` (``reference/sampling.py``) in JAX, for a batch.

Every setting is an array, one entry a sequence, so other settings are no other program; what no
sequence asks for is skipped while it runs. A sequence's token depends on its own row alone.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from qwen3_moe_jax.sampling import Sampling

CANDIDATES = 64
"""A top_k up to this many is served by a partial sort of the vocabulary."""


Masks = Callable[[], tuple[jax.Array, jax.Array]]
"""Gives bool [B, V] twice: the tokens of each prompt, and those written since."""


@struct.dataclass
class SamplingArrays:
    """Sampling parameters of a batch, as arguments of a jitted program.

    Attributes:
      temperature, top_p, min_p, repetition_penalty, presence_penalty: float32 [B].
      top_k: int32 [B].
      seed: uint32 [B].
    """

    temperature: jax.Array
    top_k: jax.Array
    top_p: jax.Array
    min_p: jax.Array
    repetition_penalty: jax.Array
    presence_penalty: jax.Array
    seed: jax.Array

    @classmethod
    def of(cls, batch: list[Sampling]) -> "SamplingArrays":
        """Packs one Sampling a sequence."""

        def column(name: str, dtype: type) -> np.ndarray:
            return np.asarray([getattr(s, name) for s in batch], dtype)

        return cls(
            temperature=column("temperature", np.float32),
            top_k=column("top_k", np.int32),
            top_p=column("top_p", np.float32),
            min_p=column("min_p", np.float32),
            repetition_penalty=column("repetition_penalty", np.float32),
            presence_penalty=column("presence_penalty", np.float32),
            seed=np.asarray([s.seed % 2**32 for s in batch], np.uint32),
        )

    @property
    def penalized(self) -> jax.Array:
        """bool [B], whether some penalty is on."""
        return (self.repetition_penalty != 1) | (self.presence_penalty != 0)


def penalize(
    logits: jax.Array, sampling: SamplingArrays, in_prompt: jax.Array, in_output: jax.Array
) -> jax.Array:
    """Repetition and presence penalties on logits [B, V]; the masks are bool [B, V]."""
    repetition = sampling.repetition_penalty[:, None]
    scaled = jnp.where(logits > 0, logits / repetition, logits * repetition)
    logits = jnp.where(in_prompt | in_output, scaled, logits)
    return logits - sampling.presence_penalty[:, None] * in_output.astype(logits.dtype)


def choose_tokens(
    logits: jax.Array, sampling: SamplingArrays, positions: jax.Array, masks: Masks | None = None
) -> jax.Array:
    """One token id a sequence, int32 [B], from logits [B, V].

    The random number of a token depends on the sequence's seed and the token's
    position [B] alone, so the same text comes from any batch and any chunking.

    Args:
      masks: gives ``penalize``'s masks, where they are needed; None leaves penalties out.
    """
    is_sampled = sampling.temperature > 0
    is_narrow = (sampling.top_k > 0) & (sampling.top_k <= CANDIDATES)
    is_wide = is_sampled & ~is_narrow
    vocab_size = logits.shape[-1]

    def greedy(logits: jax.Array) -> jax.Array:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)

    def narrow(logits: jax.Array) -> jax.Array:
        logits = logits if masks is None else penalize(logits, sampling, *masks())
        few = _sample(logits, sampling, positions, min(CANDIDATES, vocab_size))
        return jnp.where(is_sampled, few, greedy(logits))

    def wide(logits: jax.Array) -> jax.Array:
        others = narrow(logits)
        logits = logits if masks is None else penalize(logits, sampling, *masks())
        return jnp.where(is_wide, _sample(logits, sampling, positions, vocab_size), others)

    # one branch a token, for a GPU waits for the host at each; whichever it is, a row's result is the same
    work = jnp.where(jnp.any(is_wide), 2, jnp.any(is_sampled | sampling.penalized).astype(jnp.int32))
    return jax.lax.switch(work, (greedy, narrow, wide), logits)


def _sample(logits: jax.Array, sampling: SamplingArrays, positions: jax.Array, candidates: int) -> jax.Array:
    """Draws from the highest ``candidates`` logits of every sequence: int32 [B]."""
    return jax.vmap(_sample_one, in_axes=(0, 0, 0, 0, 0, 0, 0, None))(
        logits,
        jnp.where(sampling.temperature > 0, sampling.temperature, 1.0),
        sampling.top_k,
        sampling.top_p,
        sampling.min_p,
        sampling.seed,
        positions,
        candidates,
    )


def _sample_one(logits, temperature, top_k, top_p, min_p, seed, position, candidates):
    values, ids = jax.lax.top_k(logits / temperature, candidates)  # sorted, lowest id first among equals
    rank = jnp.arange(candidates)
    kept = jnp.where((top_k == 0) | (rank < top_k), jnp.exp(values - values[0]), 0.0)
    kept = kept / jnp.sum(kept)
    before = jnp.cumsum(kept) - kept
    kept = jnp.where(before < top_p, kept, 0.0)
    kept = jnp.where(kept >= min_p * kept[0], kept, 0.0)
    key = jax.random.fold_in(jax.random.key(seed), position)
    return ids[jax.random.categorical(key, jnp.log(kept))].astype(jnp.int32)
