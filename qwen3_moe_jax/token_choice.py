"""Sampling on the device: the meaning of ``Sampling`` (``reference/sampling.py``) in JAX, for a batch."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from qwen3_moe_jax.sampling import Sampling

CANDIDATES = 64
"""A top_k up to this many is served by a partial sort of the vocabulary."""


@struct.dataclass
class SamplingArrays:
    """Sampling parameters of a batch, as arguments of a jitted program.

    Attributes:
      temperature, top_k, top_p, min_p, repetition_penalty, presence_penalty: [B].
      seed: uint32 [B].
      greedy: static; every temperature is 0.
      penalized: static; some penalty is on.
      candidates: static; how many of the highest logits are looked at, 0 for all.
    """

    temperature: jax.Array
    top_k: jax.Array
    top_p: jax.Array
    min_p: jax.Array
    repetition_penalty: jax.Array
    presence_penalty: jax.Array
    seed: jax.Array
    greedy: bool = struct.field(pytree_node=False)
    penalized: bool = struct.field(pytree_node=False)
    candidates: int = struct.field(pytree_node=False)

    @classmethod
    def of(cls, batch: list[Sampling]) -> "SamplingArrays":
        """Packs one Sampling a sequence."""

        def column(name: str, dtype: type) -> np.ndarray:
            return np.asarray([getattr(s, name) for s in batch], dtype)

        narrow = all(0 < s.top_k <= CANDIDATES or s.temperature == 0 for s in batch)
        return cls(
            temperature=column("temperature", np.float32),
            top_k=column("top_k", np.int32),
            top_p=column("top_p", np.float32),
            min_p=column("min_p", np.float32),
            repetition_penalty=column("repetition_penalty", np.float32),
            presence_penalty=column("presence_penalty", np.float32),
            seed=np.asarray([s.seed % 2**32 for s in batch], np.uint32),
            greedy=all(s.temperature == 0 for s in batch),
            penalized=any(s.repetition_penalty != 1 or s.presence_penalty != 0 for s in batch),
            candidates=CANDIDATES if narrow else 0,
        )


def penalize(
    logits: jax.Array, sampling: SamplingArrays, in_prompt: jax.Array, in_output: jax.Array
) -> jax.Array:
    """Repetition and presence penalties on logits [B, V]; the masks are bool [B, V]."""
    repetition = sampling.repetition_penalty[:, None]
    scaled = jnp.where(logits > 0, logits / repetition, logits * repetition)
    logits = jnp.where(in_prompt | in_output, scaled, logits)
    return logits - sampling.presence_penalty[:, None] * in_output.astype(logits.dtype)


def choose_tokens(logits: jax.Array, sampling: SamplingArrays, positions: jax.Array) -> jax.Array:
    """One token id a sequence, int32 [B], from penalized logits [B, V].

    The random number of a token depends on the sequence's seed and the token's
    position [B] alone, so the same text comes from any batch and any chunking.
    """
    highest = jnp.argmax(logits, axis=-1).astype(jnp.int32)
    if sampling.greedy:
        return highest
    sampled = jax.vmap(_sample_one, in_axes=(0, 0, 0, 0, 0, 0, 0, None))(
        logits,
        jnp.where(sampling.temperature > 0, sampling.temperature, 1.0),
        sampling.top_k,
        sampling.top_p,
        sampling.min_p,
        sampling.seed,
        positions,
        sampling.candidates or logits.shape[-1],
    )
    return jnp.where(sampling.temperature > 0, sampled, highest)


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
