"""Speed of prompts on a GPU: the whole model of random weights, in the types of a Q4_K_M file.

Every figure is the time until the device is done, the best of several runs, over different
tokens each; the last line is JSON. The limit is that of the tensor cores: the operations of
the matrix products and of causal attention over ``--tflops``, which should be what a large
16-bit matrix product reaches on the same card.

    python -m scripts.bench_prefill --tokens 512 2048 --sequences 1
"""

import argparse
import itertools
import json
import time
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from qwen3_moe_jax.convert.config import PRESETS, Qwen3MoeConfig
from qwen3_moe_jax.convert.ggml_types import GGMLType
from qwen3_moe_jax.convert.layouts.gpu_tiles import TILED_TYPES
from qwen3_moe_jax.convert.packed import GPU_TILES, PackedTensor
from qwen3_moe_jax.convert.tensor_names import q4_k_m_types
from qwen3_moe_jax.jax_backend.kv_cache import KVCache
from qwen3_moe_jax.jax_backend.params import plan_layers
from qwen3_moe_jax.jax_backend.qwen3_moe import Qwen3Moe
from qwen3_moe_jax.kernels_pallas import LayerTable
from qwen3_moe_jax.kernels_pallas.packed.stacks import abstract_packed
from qwen3_moe_jax.machine.kernels import AUTO, CHOICES, capability_of, choose_kernels
from qwen3_moe_jax.machine.limits import prefill_operations
from qwen3_moe_jax.measure.benchmark import random_prompts, repeated

SCALES = {GGMLType.Q4_K: 1.4e-4, GGMLType.Q5_K: 0.7e-4, GGMLType.Q6_K: 1.5e-5, GGMLType.Q8_0: 2.7e-4}
"""Superblock scales that give weights of about 0.02."""


def tile_shapes(kind: GGMLType, rows: int, columns: int) -> dict[str, jax.ShapeDtypeStruct]:
    """Arrays of layout "gpu_tiles" of a matrix."""
    n = (rows // 8, columns // 256)
    words = lambda *shape: jax.ShapeDtypeStruct((*n, *shape), jnp.int32)
    halves = lambda *shape: jax.ShapeDtypeStruct((*n, *shape), jnp.float16)
    match kind:
        case GGMLType.Q8_0:
            return {"q": words(4, 8, 4, 4), "d0": halves(8, 4), "d1": halves(8, 4)}
        case GGMLType.Q6_K:
            arrays = {"ql": words(2, 8, 4, 4), "qh": words(8, 4, 4)}
            return {**arrays, "scales": words(8, 4), "d": halves(8)}
        case _:
            arrays = {"q": words(2, 8, 4, 4), "scales": words(8, 4), "d": halves(8), "dmin": halves(8)}
            return arrays | ({"qh": words(2, 8, 4)} if kind is GGMLType.Q5_K else {})


@partial(jax.jit, static_argnums=(1, 2, 3))
def random_array(seed: Any, shape: tuple[int, ...], mask: int, scale: float) -> jax.Array:
    """Random int32 words under ``mask``; or float16 around ``scale`` where that is not zero."""
    key = jnp.stack([jnp.uint32(n) for n in (seed, 7, 11, 13)])
    bits = lax.rng_bit_generator(key, shape, jnp.uint32)[1]
    if scale:
        return (scale * (0.75 + 0.5 * (bits >> 8).astype(jnp.float32) * 2.0**-24)).astype(jnp.float16)
    return lax.bitcast_convert_type(bits & jnp.uint32(mask), jnp.int32)


def random_tiles(seed: int, kind: GGMLType, rows: int, columns: int) -> PackedTensor:
    """Random weights in layout "gpu_tiles", made on the device."""
    arrays = {}
    for i, (name, like) in enumerate(tile_shapes(kind, rows, columns).items()):
        six_bits = name == "scales" and kind in (GGMLType.Q4_K, GGMLType.Q5_K)
        mean = 7.5 if kind is GGMLType.Q4_K else 15.5
        scale = SCALES[kind] * (mean if name == "dmin" else 1) if like.dtype == jnp.float16 else 0.0
        mask = 0x3F3F3F3F if six_bits else 0xFFFFFFFF
        arrays[name] = random_array(seed * 16 + i, like.shape, mask, scale)
    return PackedTensor(arrays, kind, GPU_TILES)


ROW_SCALES = {
    GGMLType.Q4_0: {"d": 4.3e-3},
    GGMLType.Q4_1: {"d": 4.3e-3, "m": -3.3e-2},
    GGMLType.Q5_0: {"d": 2.2e-3},
    GGMLType.Q5_1: {"d": 2.2e-3, "m": -3.4e-2},
    GGMLType.IQ4_NL: {"d": 3e-4},
    GGMLType.IQ4_XS: {"d": 8e-6},
    GGMLType.Q2_K: {"d": 2.2e-3, "dmin": 3.3e-3},
    GGMLType.Q3_K: {"d": 2.4e-4},
}
"""Mean of the float16 arrays of weights that lie in rows."""


def random_rows(seed: int, kind: GGMLType, rows: int, columns: int) -> PackedTensor:
    """Random weights in layout "rows" of a type that tiles do not hold, made on the device."""
    arrays = {}
    for i, (name, like) in enumerate(abstract_packed(kind, (rows, columns)).arrays.items()):
        key = seed * 16 + i
        if name == "w":
            w = (2e-2 * jax.random.normal(jax.random.key(key), like.shape)).astype(jnp.bfloat16)
            is_half = like.dtype == jnp.float16
            arrays[name] = w.astype(jnp.float16) if is_half else lax.bitcast_convert_type(w, jnp.uint16)
        elif like.dtype == jnp.float16:
            arrays[name] = random_array(key, like.shape, 0, ROW_SCALES[kind][name])
        elif name == "e":
            arrays[name] = jnp.full(like.shape, 120, jnp.uint8)
        else:
            *leading, last = like.shape
            words = random_array(key, (*leading, last // 4), 0xFFFFFFFF, 0.0)
            arrays[name] = lax.bitcast_convert_type(words, like.dtype).reshape(like.shape)
    return PackedTensor(arrays, kind)


def random_matrices(seed: int, kind: GGMLType, rows: int, columns: int) -> PackedTensor:
    """Random weights as a GPU holds them."""
    make = random_tiles if kind in TILED_TYPES else random_rows
    return make(seed, kind, rows, columns)


def random_params(config: Qwen3MoeConfig, types: dict[str, GGMLType], roles: Any = None) -> dict[str, Any]:
    """The model's parameters; embeddings are plain bfloat16 bits, which every layout's lookup can read.

    ``roles``: tensors that share stacks, as ``params.GPU_ROLES``.
    """
    plan = plan_layers(config, types, roles or {})
    stacks: dict[str, Any] = {}
    for i, (name, like) in enumerate(plan.stacks.items()):
        key = jax.random.key(i)
        if not isinstance(like, PackedTensor):
            stacks[name] = jnp.ones(like.shape, jnp.float32)
        elif like.type is GGMLType.F32:
            w = 0.02 * jax.random.normal(key, like.shape, jnp.float32)
            stacks[name] = PackedTensor({"w": w}, GGMLType.F32)
        else:
            stacks[name] = random_matrices(i, like.type, *like.shape)
    embedding = jax.random.normal(jax.random.key(99), (config.vocab_size, config.hidden_size), jnp.bfloat16)
    bits = lax.bitcast_convert_type(embedding, jnp.uint16)
    return {
        "layers": LayerTable(stacks, plan.tensors),
        "norm": jnp.ones(config.hidden_size, jnp.float32),
        "embed_tokens": PackedTensor({"w": bits}, GGMLType.BF16),
        "lm_head": random_matrices(99, types["lm_head"], config.vocab_size, config.hidden_size),
    }


@partial(jax.jit, static_argnums=0, donate_argnums=2)
def chunk_step(model: Qwen3Moe, params: Any, cache: KVCache, token_ids: jax.Array, start: jax.Array):
    """One chunk: the last token's logits [B, V] and the cache."""
    network = model.bind(params)
    output = network(token_ids, cache, start)
    logits = network.logits(output.hidden[:, -1:])
    return logits[:, 0], output.cache


def measure(model, params, sequences: int, tokens: int, chunk: int, repeats: int) -> float:
    """Best seconds of ``repeats`` prefills of ``sequences`` prompts of ``tokens``."""
    seeds = itertools.count()

    def run() -> tuple[float]:
        cache = KVCache.create(model.config, sequences, tokens, jnp.bfloat16)
        ids = jnp.asarray(random_prompts(model.config, sequences, tokens, next(seeds)))
        jax.block_until_ready((cache, ids))
        began = time.perf_counter()
        for start in range(0, tokens, chunk):
            starts = jnp.full((sequences,), start, jnp.int32)
            logits, cache = chunk_step(model, params, cache, ids[:, start : start + chunk], starts)
        finite = bool(jnp.isfinite(logits).all())
        seconds = time.perf_counter() - began
        if not finite:
            raise ArithmeticError(f"logits of {sequences} x {tokens} tokens are not finite")
        return (seconds,)

    (timing,) = repeated(run, repeats)
    print(f"{sequences} x {tokens}: first run {timing.first_run:.1f} s", flush=True)
    return min(timing.runs)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--preset", default="Qwen3-30B-A3B", choices=sorted(PRESETS))
    parser.add_argument("--tokens", type=int, nargs="+", default=[512, 2048], help="tokens per prompt")
    parser.add_argument("--sequences", type=int, nargs="+", default=[1], help="prompts, one number each")
    parser.add_argument("--chunk", type=int, default=2048, help="most tokens of a prompt at a time")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--tflops", type=float, default=798.0, help="what the card's matrix product reaches")
    parser.add_argument("--kernels", choices=CHOICES, default=AUTO, help="forces a set of kernels")
    args = parser.parse_args()
    config = PRESETS[args.preset]
    types = q4_k_m_types(config)
    began = time.perf_counter()
    params = jax.block_until_ready(random_params(config, types))
    print(f"{jax.devices()[0].device_kind}: weights made in {time.perf_counter() - began:.1f} s", flush=True)
    kernels = choose_kernels(args.kernels, capability_of(jax.devices()[0]), jax.__version_info__).name
    model = Qwen3Moe(config, jnp.bfloat16, kernels=kernels)
    results = []
    counts = args.sequences * len(args.tokens) if len(args.sequences) == 1 else args.sequences
    for tokens, sequences in zip(args.tokens, counts, strict=True):
        chunk = min(args.chunk, tokens)
        seconds = measure(model, params, sequences, tokens, chunk, args.repeats)
        work = prefill_operations(config, sequences, tokens)
        share = work / seconds / (args.tflops * 1e12)
        results.append(
            {
                "sequences": sequences,
                "tokens": tokens,
                "seconds": round(seconds, 5),
                "tokens_per_second": round(sequences * tokens / seconds),
                "share_of_limit": round(share, 4),
            }
        )
        print(results[-1], flush=True)
    print(json.dumps({"device": jax.devices()[0].device_kind, "kernels": kernels, "prefill": results}))


if __name__ == "__main__":
    main()
