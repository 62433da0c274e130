"""Sampling on the device: the meaning of ``Sampling`` (``reference/sampling.py``) in JAX, for a batch.

Every setting is an array, one entry per sequence, so other settings are no other program; what no
sequence asks for is skipped while it runs. A sequence's token depends on its own row alone.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import qwen3_moe_jax.kernels_pallas as ops
from qwen3_moe_jax.core.sampling import Sampling
from qwen3_moe_jax.jax_backend.settings import RANDOM_BITS
from qwen3_moe_jax.jax_backend.trees import tree_dataclass

CANDIDATES = 64
"""A top_k up to this many is served by a partial sort of the vocabulary."""

GREEDY, NARROW, WIDE = range(3)
"""What a batch needs: the largest logit of each; or sampling of CANDIDATES; or of the whole vocabulary."""

Masks = Callable[[], tuple[jax.Array, jax.Array]]
"""Gives bool [B, V] twice: the tokens of each prompt, and those written since."""


@tree_dataclass
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

        def numbers(values: list[Any], dtype: type) -> Any:
            return np.asarray(values, dtype)  # an argument of a program, which JAX takes as an array

        def column(name: str, dtype: type) -> Any:
            return numbers([getattr(s, name) for s in batch], dtype)

        return cls(
            temperature=column("temperature", np.float32),
            top_k=column("top_k", np.int32),
            top_p=column("top_p", np.float32),
            min_p=column("min_p", np.float32),
            repetition_penalty=column("repetition_penalty", np.float32),
            presence_penalty=column("presence_penalty", np.float32),
            seed=numbers([s.seed % 2**32 for s in batch], np.uint32),
        )

    @property
    def penalized(self) -> jax.Array:
        """bool [B], whether some penalty is on."""
        return (self.repetition_penalty != 1) | (self.presence_penalty != 0)


FORBIDDEN = -1e30
"""Logit of a token that may not come: finite after every penalty and temperature, its probability 0."""


def allow_only(logits: jax.Array, allowed: jax.Array, masked: jax.Array) -> jax.Array:
    """Logits [B, V] of the masked rows, bool [B], with FORBIDDEN where ``allowed``, int32 [B, ceil(V / 32)],
    has no bit; other rows, and what is not finite, stay."""

    def forbid(logits: jax.Array) -> jax.Array:
        bits = (allowed[:, :, None] >> jnp.arange(32)) & 1
        may_come = bits.reshape(len(allowed), -1)[:, : logits.shape[-1]].astype(bool)
        stays = may_come | ~masked[:, None] | ~jnp.isfinite(logits)
        return jnp.where(stays, logits, FORBIDDEN)

    return jax.lax.cond(jnp.any(masked), forbid, lambda logits: logits, logits)


def penalize(
    logits: jax.Array, sampling: SamplingArrays, in_prompt: jax.Array, in_output: jax.Array
) -> jax.Array:
    """Repetition and presence penalties on logits [B, V]; the masks are bool [B, V]."""
    repetition = sampling.repetition_penalty[:, None]
    scaled = jnp.where(logits > 0, logits / repetition, logits * repetition)
    logits = jnp.where(in_prompt | in_output, scaled, logits)
    return logits - sampling.presence_penalty[:, None] * in_output.astype(logits.dtype)


def work_of(sampling: SamplingArrays) -> jax.Array:
    """Which of GREEDY, NARROW and WIDE a batch needs, int32: the most that one of its sequences asks for."""
    is_sampled = sampling.temperature > 0
    return jnp.where(
        jnp.any(is_wide(sampling)), WIDE, jnp.any(is_sampled | sampling.penalized).astype(jnp.int32)
    )


def work_for(sampling: Sampling) -> int:
    """As ``work_of``, of one sequence, for the host."""
    if is_wide(sampling):
        return WIDE
    is_penalized = sampling.repetition_penalty != 1 or sampling.presence_penalty != 0
    return NARROW if sampling.temperature > 0 or is_penalized else GREEDY


def choose_tokens(
    logits: jax.Array,
    sampling: SamplingArrays,
    positions: jax.Array,
    masks: Masks | None = None,
    work: int | jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
    """One token id a sequence, int32 [B], from logits [B, V], and whether its logits are finite, bool [B].

    The random number of a token depends on the sequence's seed and the token's
    position [B] alone, so the same text comes from any batch and any chunking.

    Args:
      masks: gives ``penalize``'s masks, where they are needed; None leaves penalties out.
      work: ``work_of(sampling)``, or the same as a Python number, which leaves out the other branches:
        at a branch a GPU waits for the host. Whichever it is, a row's result is the same.
    """
    is_sampled = sampling.temperature > 0
    vocab_size = logits.shape[-1]

    def narrow(logits: jax.Array) -> jax.Array:
        logits = logits if masks is None else penalize(logits, sampling, *masks())
        draw = lambda logits: _sample(logits, sampling, positions, min(CANDIDATES, vocab_size))
        few = jax.lax.platform_dependent(logits, cpu=partial(_if_any, is_sampled, draw), default=draw)
        return jnp.where(is_sampled, few, _largest(logits)[0])

    def wide(logits: jax.Array) -> jax.Array:
        others = narrow(logits)
        logits = logits if masks is None else penalize(logits, sampling, *masks())
        return jnp.where(is_wide(sampling), _sample(logits, sampling, positions, vocab_size), others)

    def checked(
        choose: Callable[[jax.Array], jax.Array],
    ) -> Callable[[jax.Array], tuple[jax.Array, jax.Array]]:
        return lambda logits: (choose(logits), jnp.isfinite(logits).all(axis=-1))

    branches = (_largest, checked(narrow), checked(wide))
    work = work_of(sampling) if work is None else work
    return branches[work](logits) if isinstance(work, int) else jax.lax.switch(work, branches, logits)


def _if_any(is_sampled: jax.Array, draw: Callable[[jax.Array], jax.Array], logits: jax.Array) -> jax.Array:
    """What ``draw`` gives, int32 [B], if some row is sampled: greedy rows with penalties want none of it, and
    on a CPU, where a branch costs nothing, it takes a third of a small model's time."""
    none = lambda logits: jnp.zeros(logits.shape[:1], jnp.int32)
    return jax.lax.cond(jnp.any(is_sampled), draw, none, logits)


def is_wide(sampling: Sampling | SamplingArrays) -> bool | jax.Array:
    """Whether (of each, bool [B]) the whole vocabulary has to be sorted for it."""
    return (sampling.temperature > 0) & ((sampling.top_k == 0) | (sampling.top_k > CANDIDATES))


def _largest(logits: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The first of each row's largest logits, int32 [B], and whether all are finite."""
    keys = jnp.where(jnp.isfinite(logits), logits, jnp.inf)
    key, token = jax.lax.platform_dependent(keys, cpu=_largest_in_two_passes, default=_largest_in_one_pass)
    return token, key < jnp.inf


def _largest_in_one_pass(keys: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The minimum of launches."""
    ids = jax.lax.broadcasted_iota(jnp.int32, keys.shape, keys.ndim - 1)

    def larger(a: tuple[jax.Array, jax.Array], b: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        is_a = (a[0] > b[0]) | ((a[0] == b[0]) & (a[1] < b[1]))
        return jnp.where(is_a, a[0], b[0]), jnp.where(is_a, a[1], b[1])

    start = (jnp.asarray(-jnp.inf, keys.dtype), jnp.int32(0))
    return tuple(jax.lax.reduce((keys, ids), start, larger, (keys.ndim - 1,)))


def _largest_in_two_passes(keys: jax.Array) -> tuple[jax.Array, jax.Array]:
    """A third of the time on a CPU, whose vector instructions serve both passes."""
    key = jnp.max(keys, axis=-1)
    ids = jax.lax.broadcasted_iota(jnp.int32, keys.shape, keys.ndim - 1)
    return key, jnp.min(jnp.where(keys == key[..., None], ids, keys.shape[-1]), axis=-1)


def _sample(logits: jax.Array, sampling: SamplingArrays, positions: jax.Array, candidates: int) -> jax.Array:
    """Draws from the highest ``candidates`` logits of every sequence: int32 [B]."""
    temperature = jnp.where(sampling.temperature > 0, sampling.temperature, 1.0)
    values, ids = ops.top_k(logits / temperature[:, None], candidates)  # sorted, lowest id first among equals
    return jax.vmap(_sample_one)(
        values, ids, sampling.top_k, sampling.top_p, sampling.min_p, sampling.seed, positions
    )


def _sample_one(
    values: jax.Array,
    ids: jax.Array,
    top_k: jax.Array,
    top_p: jax.Array,
    min_p: jax.Array,
    seed: jax.Array,
    position: jax.Array,
) -> jax.Array:
    rank = jnp.arange(len(values))
    kept = jnp.where((top_k == 0) | (rank < top_k), jnp.exp(values - values[0]), 0.0)
    kept = kept / jnp.sum(kept)
    before = jnp.cumsum(kept) - kept
    kept = jnp.where(before < top_p, kept, 0.0)
    kept = jnp.where(kept >= min_p * kept[0], kept, 0.0)
    key = jax.random.fold_in(jax.random.key(seed, impl=RANDOM_BITS), position)
    return ids[jax.random.categorical(key, jnp.log(kept))].astype(jnp.int32)
