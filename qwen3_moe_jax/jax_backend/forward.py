"""A forward pass over whole prompts in chunks: logits, experts and stages of one row of the batch."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from qwen3_moe_jax.core.runner import Forward, TokenIds
from qwen3_moe_jax.core.runner_arguments import ForwardRequest
from qwen3_moe_jax.core.stages import LAYER_STAGES, StageKey
from qwen3_moe_jax.jax_backend.decode_path import Decoder
from qwen3_moe_jax.jax_backend.generate import COMPILER_OPTIONS, PREFILL_CHUNKS, chunk_lengths
from qwen3_moe_jax.jax_backend.kv_cache import KVCache, whole_tiles
from qwen3_moe_jax.jax_backend.params import Params
from qwen3_moe_jax.jax_backend.programs import Program

LAYER_STAGE_NAMES = frozenset(stage.name for stage in LAYER_STAGES)


def forward(
    decoder: Decoder, params: Params, r: ForwardRequest, new_cache: Callable[[int, int], KVCache]
) -> Forward:
    """Runs a prompt from an empty cache, in a batch with ``r.beside``; ``Runner.forward`` explains ``r``.

    Args:
      decoder, params: the network.
      r: what is asked for, checked.
      new_cache: makes an empty cache of so many rows and positions, which is given up.
    """
    token_ids, chosen, expert_ids = r.token_ids, r.layers, r.expert_ids
    row = len(r.beside) // 2
    tokens = _rows([*r.beside[:row], token_ids, *r.beside[row:]], len(token_ids))
    decoder = decoder.clone(
        capture=r.capture, interventions=r.interventions, layers=None if r.is_whole else chosen
    )
    chunks = chunk_lengths(len(token_ids), r.chunk_sizes or PREFILL_CHUNKS)
    length = whole_tiles(sum(chunks))  # prompts of nearby lengths share a program
    cache = new_cache(len(tokens), length)
    parts, start = [], 0
    for chunk in chunks:
        part = slice(start, start + chunk)
        forced = None
        if expert_ids is not None:
            forced = _padded(expert_ids[:, part], 1, chunk)[:, None].repeat(len(tokens), axis=1)
        ids, begin = _padded(tokens[:, part], 1, chunk), np.full((len(tokens),), start, np.int32)
        outputs = forward_chunk(decoder, params, cache, ids, begin, forced, row)
        cache = outputs.pop("cache")
        real = min(chunk, len(token_ids) - start)
        parts.append(jax.tree.map(lambda x, n=real: np.asarray(x)[:n], outputs))
        start += chunk
    whole = jax.tree.map(lambda *p: np.concatenate(p), *parts)
    stages = {
        (name, None if index is None else chosen[index]): value
        for (name, index), value in whole["stages"].items()
    }
    return Forward(whole["logits"], np.moveaxis(whole["expert_ids"], 0, 1), stages)


@partial(
    Program,
    static_argnames=("decoder", "row"),
    donate_argnames=("cache",),
    compiler_options=COMPILER_OPTIONS,
    is_long=True,
)
def forward_chunk(
    decoder: Decoder,
    params: Params,
    cache: KVCache,
    token_ids: jax.Array,
    start: jax.Array,
    expert_ids: jax.Array | None,
    row: int,
) -> dict[str, Any]:
    """One chunk of a batch of prompts [B, T], its row ``row`` alone: logits [T, V], expert_ids [T, L, X],
    stages with T first; and the cache of the batch."""
    step = decoder.read(params, token_ids, start, cache, expert_ids)
    return {
        "logits": step.logits[row],
        "expert_ids": jnp.moveaxis(step.expert_ids[:, row], 0, 1),
        "cache": step.cache,
        "stages": dict(_sown(step.stages, row)),
    }


def _sown(stages: Mapping[str, jax.Array], row: int) -> Iterator[tuple[StageKey, jax.Array]]:
    """Stages of one sequence out of Flax's collection: ((name, index of the layer), value [T, ...])."""
    for name, value in stages.items():
        if name in LAYER_STAGE_NAMES:
            yield from (((name, i), layer[row]) for i, layer in enumerate(value))
        else:
            yield (name, None), value[row]


def _rows(sequences: Sequence[TokenIds], length: int) -> np.ndarray:
    """Token ids int32 [B, length]: longer sequences are cut, zeros follow shorter ones."""
    rows = np.zeros((len(sequences), length), np.int32)
    for row, sequence in zip(rows, sequences, strict=True):
        part = np.asarray(sequence[:length])
        row[: len(part)] = part
    return rows


def _padded(values: np.ndarray, axis: int, length: int) -> np.ndarray:
    """``values`` with zeros after them up to ``length`` along ``axis``."""
    widths = [(0, 0)] * values.ndim
    widths[axis] = (0, length - values.shape[axis])
    return np.pad(values, widths)
