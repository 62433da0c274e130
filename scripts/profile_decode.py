"""Random packed weights on the device, and a float32 reference for the decode kernel.

The weights have the shapes, types and bytes of a real Q4_K_M file. ``python
scripts/profile_decode.py`` checks the kernel against the reference and times it; see
``scripts/bench_decode.py`` for the figures of a file.
"""

import argparse
import json
import os
import sys
import time
import traceback
from dataclasses import replace
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from convert.config import PRESETS
from convert.ggml_types import GGMLType
from convert.packed import PackedTensor
from kernels_pallas.decode_step import api
from kernels_pallas.decode_step.weights import DecodeWeights, LayerTypes, column_names, plan_stacks
from kernels_pallas.embedding_lookup.api import embedding_lookup
from kernels_pallas.norm_rope import rope, rope_tables

HIGHEST = lax.Precision.HIGHEST
D_SCALE = {GGMLType.Q4_K: 1.4e-4, GGMLType.Q5_K: 0.7e-4, GGMLType.Q6_K: 1.5e-5, GGMLType.Q8_0: 2.7e-4}


def use_more_bits(i: int, n: int) -> bool:
    return i < n // 8 or i >= 7 * n // 8 or (i - n // 8) % 3 == 2


def stack_shapes(type: GGMLType, tiles: int, superblocks: int) -> dict:
    i, f, n = jnp.int32, jnp.float16, (tiles, superblocks)
    if type is GGMLType.Q8_0:
        return {"q": ((*n, 4, 8, 4, 4), i), "d0": ((*n, 8, 4), f), "d1": ((*n, 8, 4), f)}
    if type is GGMLType.Q6_K:
        q = {"ql": ((*n, 2, 8, 4, 4), i), "qh": ((*n, 8, 4, 4), i)}
        return {**q, "scales": ((*n, 8, 4), i), "d": ((*n, 8), f)}
    q = {"q": ((*n, 2, 8, 4, 4), i), "scales": ((*n, 8, 4), i), "d": ((*n, 8), f), "dmin": ((*n, 8), f)}
    return {**q, "qh": ((*n, 2, 8, 4), i)} if type is GGMLType.Q5_K else q


@partial(jax.jit, static_argnums=(1, 2))
def random_array(seed, shape, kind):
    key = jnp.stack([jnp.uint32(seed), jnp.uint32(7), jnp.uint32(11), jnp.uint32(13)])
    if kind == "words":
        return lax.bitcast_convert_type(lax.rng_bit_generator(key, shape, jnp.uint32)[1], jnp.int32)
    if kind == "scales":  # six-bit scales and mins
        bits = lax.rng_bit_generator(key, shape, jnp.uint32)[1] & jnp.uint32(0x3F3F3F3F)
        return lax.bitcast_convert_type(bits, jnp.int32)
    bits = lax.rng_bit_generator(key, shape, jnp.uint32)[1]
    return (kind * (0.75 + 0.5 * (bits >> 8).astype(jnp.float32) * 2.0**-24)).astype(jnp.float16)


def random_stack(seed: int, type: GGMLType, tiles: int, superblocks: int) -> dict:
    out = {}
    for j, (name, (shape, dtype)) in enumerate(stack_shapes(type, tiles, superblocks).items()):
        kind = "words"
        if name == "scales" and type in (GGMLType.Q4_K, GGMLType.Q5_K):
            kind = "scales"
        if dtype == jnp.float16:
            kind = D_SCALE[type] * (
                7.5 if type is GGMLType.Q4_K and name == "dmin" else 15.5 if name == "dmin" else 1
            )
        out[name] = random_array(seed * 16 + j, shape, kind)
    return out


def random_weights(config, layers: list[LayerTypes], lm_head: GGMLType, seed: int = 1) -> DecodeWeights:
    plan = plan_stacks(layers, config=config)
    d, f = config.hidden_size // 256, config.moe_intermediate_size // 256
    width = config.num_attention_heads * config.head_dim // 256
    columns = {"qkv": d, "o": width, "gate": d, "up": d, "down": f}
    stacks = {
        role: [
            random_stack(seed * 64 + 8 * r + t, type, plan.tiles[role][t], columns[role])
            for t, type in enumerate(plan.types[role])
        ]
        for r, role in enumerate(columns)
    }
    stacks["lm_head"] = [random_stack(seed * 64 + 63, lm_head, config.vocab_size // 8, d)]
    rng = np.random.default_rng(seed)
    n, dim = config.num_hidden_layers, config.hidden_size
    f32 = lambda *shape: jnp.asarray(rng.normal(1, 0.1, shape).astype(np.float32))
    router = jnp.asarray(rng.normal(0, 0.03, (n, config.num_experts, dim)).astype(np.float32))
    v = config.vocab_size
    embed = PackedTensor(
        {
            "q": jnp.asarray(rng.integers(0, 256, (v, dim // 2), dtype=np.uint8)),
            "scales": jnp.asarray(rng.integers(0, 64, (v, dim // 32), dtype=np.uint8)),
            "mins": jnp.asarray(rng.integers(0, 64, (v, dim // 32), dtype=np.uint8)),
            "d": jnp.full((v, dim // 256), 1.4e-4, jnp.float16),
            "dmin": jnp.full((v, dim // 256), 1e-3, jnp.float16),
        },
        GGMLType.Q4_K,
    )
    types = tuple((r, tuple(t)) for r, t in {**plan.types, "lm_head": (lm_head,)}.items())
    head = config.head_dim
    return DecodeWeights(
        stacks, jnp.asarray(plan.table), router, f32(n, dim), f32(n, dim), f32(n, head), f32(n, head),
        f32(dim), embed, types, plan.qkv_always,
    )  # fmt: skip


def q4_k_m(config) -> list[LayerTypes]:
    n = config.num_hidden_layers
    more = [GGMLType.Q6_K if use_more_bits(i, n) else GGMLType.Q4_K for i in range(n)]
    q4 = GGMLType.Q4_K
    return [LayerTypes(q4, q4, t, q4, q4, t) for t in more]


# The reference: float32 dequantization of tiles, one matrix at a time.


def _bytes(words):
    b = lax.bitcast_convert_type(words, jnp.uint8)
    return b.reshape(*words.shape[:-1], 16).astype(jnp.int32)


def dequantize_tiles(type: GGMLType, a: dict) -> jax.Array:
    """float32 [tiles * 8, K] of arrays [tiles, K / 256, ...]."""
    halves = []
    f32 = lambda v: v.astype(jnp.float32)
    for s in range(2):
        for h in range(2):
            if type is GGMLType.Q8_0:
                q = _bytes(a["q"][:, :, 2 * s + h])
                q = jnp.where(q > 127, q - 256, q)
                halves.append(f32(q) * f32(a[f"d{s}"])[..., None])
                continue
            q = _bytes(a["ql" if type is GGMLType.Q6_K else "q"][:, :, h]) >> (4 * s) & 15
            scales = f32(a["d"])[..., None]
            scale = a["scales"]
            if type is GGMLType.Q6_K:
                q = q | (_bytes(a["qh"]) >> (2 * (2 * h + s)) & 3) << 4
                byte = (scale << (24 - 8 * (2 * s + h))) >> 24
                halves.append(f32(q - 32) * (scales * f32(byte))[..., None])
                continue
            if type is GGMLType.Q5_K:
                byte = lax.bitcast_convert_type(a["qh"][:, :, h], jnp.uint8).astype(jnp.int32)
                q = q | jnp.stack([byte >> (j + 4 * s) & 1 for j in range(4)], -2).reshape(q.shape) << 4
            low = f32(a["dmin"])[..., None] * f32(scale >> (16 + 8 * s) & 255)
            halves.append(f32(q) * (scales * f32(scale >> (8 * s) & 255))[..., None] - low[..., None])
    w = jnp.stack(halves, -2)  # [tiles, superblocks, 8, 4, 4 halves, 16]
    w = w.reshape(*w.shape[:3], 256).transpose(0, 2, 1, 3)
    return w.reshape(w.shape[0] * 8, -1)


@partial(jax.jit, static_argnums=(0, 3))
def matvec(type, stack, start, tiles, x):
    part = {k: lax.dynamic_slice_in_dim(v, start, tiles) for k, v in stack.items()}
    return jnp.matmul(x, dequantize_tiles(type, part).T, precision=HIGHEST)


def rms(x, w, eps):
    return x * lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + eps) * w


class Reference:
    """Plain float32 decoding of the same weights, one sequence at a time."""

    def __init__(self, w: DecodeWeights, config):
        self.w, self.c = w, config
        self.table = np.asarray(w.table)
        self.columns = column_names(len(w.types_of("qkv")))

    def col(self, layer, name):
        return int(self.table[layer, self.columns[name]])

    def qkv(self, layer, h):
        out = []
        for t, type in enumerate(self.w.types_of("qkv")):
            count = self.col(layer, f"qkv_count{t}")
            if count:
                out.append(matvec(type, self.w.stacks["qkv"][t], self.col(layer, f"qkv_offset{t}"), count, h))
        y = jnp.concatenate(out)
        c, n = self.c, self.c.head_dim
        take = lambda name, heads: y[self.col(layer, name) * n :][: heads * n].reshape(heads, n)
        kv = c.num_key_value_heads
        return take("q_head", c.num_attention_heads), take("k_head", kv), take("v_head", kv)

    def __call__(self, token: int, position: int, keys, values, expert_ids):
        """keys, values: float32 [L, S, K, H] of earlier tokens. Returns logits [V]."""
        w, c = self.w, self.c
        x = embedding_lookup(w.embed_tokens, jnp.array([token]))[0]
        cos, sin = rope_tables(jnp.array([position]), c.head_dim, c.rope_theta)
        group = c.num_attention_heads // c.num_key_value_heads
        per_expert = c.moe_intermediate_size // 8
        worst = []
        for i in range(c.num_hidden_layers):
            q, k, v = self.qkv(i, rms(x, w.input_norm[i], c.rms_norm_eps))
            q = rope(rms(q, w.q_norm[i], c.rms_norm_eps)[None], cos, sin)[0]
            k = rope(rms(k, w.k_norm[i], c.rms_norm_eps)[None], cos, sin)[0]
            ks = jnp.concatenate([keys[i, :position], k[None]])
            vs = jnp.concatenate([values[i, :position], v[None]])
            qg = q.reshape(c.num_key_value_heads, group, c.head_dim)
            s = jnp.einsum("kgh,skh->kgs", qg, ks, precision=HIGHEST) * c.head_dim**-0.5
            o = jnp.einsum("kgs,skh->kgh", jax.nn.softmax(s, -1), vs, precision=HIGHEST).reshape(-1)
            t = self.col(i, "o_type")
            x = x + matvec(
                w.types_of("o")[t], w.stacks["o"][t], self.col(i, "o_offset"), c.hidden_size // 8, o
            )
            h = rms(x, w.post_norm[i], c.rms_norm_eps)
            logits = jnp.matmul(w.router[i], h, precision=HIGHEST)
            ids = np.asarray(expert_ids[i])
            worst.append(len(set(np.argsort(-np.asarray(logits))[: len(ids)]) - set(ids.tolist())))
            p = jax.nn.softmax(logits[ids])
            t, d = self.col(i, "gate_up_type"), self.col(i, "down_type")
            for j, e in enumerate(ids.tolist()):
                start = self.col(i, "gate_up_offset") + e * per_expert
                type = w.types_of("gate")[t]
                gate = matvec(type, w.stacks["gate"][t], start, per_expert, h)
                up = matvec(type, w.stacks["up"][t], start, per_expert, h)
                act = jax.nn.silu(gate) * up
                start = self.col(i, "down_offset") + e * (c.hidden_size // 8)
                x = x + p[j] * matvec(
                    w.types_of("down")[d], w.stacks["down"][d], start, c.hidden_size // 8, act
                )
        h = rms(x, w.final_norm, c.rms_norm_eps)
        return matvec(w.types_of("lm_head")[0], w.stacks["lm_head"][0], 0, c.vocab_size // 8, h), sum(worst)


def cosine(a, b) -> float:
    a, b = np.asarray(a, np.float64).ravel(), np.asarray(b, np.float64).ravel()
    return float(a @ b / (np.linalg.norm(a) * np.linalg.norm(b)))


def random_cache(config, batch, length, seed=3):
    cache = api.empty_cache(config, batch, length)
    key = jax.random.key(seed)
    make = lambda k: jax.random.normal(jax.random.fold_in(key, k), cache.k.shape, jnp.bfloat16)
    return api.KVCache(make(0), make(1))


def check(w, config, batch, depth, *, layers=None) -> dict:
    """Cosine to the reference, equality of two runs, of one token of every sequence."""
    rng = np.random.default_rng(5)
    tokens = jnp.asarray(rng.integers(0, config.vocab_size, batch), jnp.int32)
    positions = jnp.asarray([max(depth - 7 * i, 0) for i in range(batch)], jnp.int32)
    cache = random_cache(config, batch, depth + 64)
    step = jax.jit(lambda w, t, p, c: api.decode_step(w, config, t, p, c))
    start = time.perf_counter()
    compiled = step.lower(w, tokens, positions, cache).compile()
    seconds = time.perf_counter() - start
    one = compiled(w, tokens, positions, cache)
    two = compiled(w, tokens, positions, cache)
    out = {
        "batch": batch, "depth": depth, "compile_s": round(seconds, 1),
        "finite": bool(jnp.isfinite(one.logits).all()),
        "same_bits": bool((one.logits == two.logits).all()),
    }  # fmt: skip
    reference = Reference(w, config)
    cosines, free = [], []
    for b in range(min(batch, 2)):
        keys, values = (a[:, b].astype(jnp.float32) for a in cache)
        expected, moved = reference(int(tokens[b]), int(positions[b]), keys, values, one.expert_ids[:, b])
        cosines.append(cosine(one.logits[b], expected))
        free.append(moved)
    out["cosine"] = [round(v, 7) for v in cosines]
    out["experts_unlike_reference"] = free
    if batch > 1:
        single = jax.jit(lambda w, t, p, c: api.decode_step(w, config, t, p, c))
        alone = single(w, tokens[:1], positions[:1], api.KVCache(cache.k[:, :1], cache.v[:, :1]))
        out["same_bits_as_batch_1"] = bool((alone.logits[0] == one.logits[0]).all())
    return out


def decode_many(w, config, tokens, positions, cache, steps: int):
    """``steps`` greedy tokens of every sequence in one dispatch: tokens [steps, B] and the cache."""

    def one(i, carry):
        written, last, cache = carry
        out = api.decode_step(w, config, last, positions + i, cache)
        last = jnp.argmax(out.logits, axis=-1).astype(jnp.int32)
        return lax.dynamic_update_slice(written, last[None], (i, 0)), last, out.cache

    written = jnp.zeros((steps, len(tokens)), jnp.int32)
    written, _, cache = lax.fori_loop(0, steps, one, (written, tokens, cache))
    return written, cache


def speed(w, config, batch, depth, steps=64, repeats=4) -> dict:
    """Tokens a second, best and median of several dispatches."""
    tokens = jnp.arange(batch, dtype=jnp.int32) * 1000 + 17
    positions = jnp.full((batch,), depth, jnp.int32)
    cache = random_cache(config, batch, depth + steps)
    run = jax.jit(lambda w, t, p, c: decode_many(w, config, t, p, c, steps), donate_argnums=(3,))
    times = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        out, cache = run(w, tokens, positions, cache)
        out.block_until_ready()
        times.append(time.perf_counter() - start)
    times = sorted(times[1:])
    median = times[len(times) // 2]
    return {
        "batch": batch, "depth": depth, "ms_per_step": round(median / steps * 1e3, 4),
        "tok_s": round(batch * steps / median, 1), "best_tok_s": round(batch * steps / times[0], 1),
    }  # fmt: skip


def trace(w, config, batch, depth, folder) -> dict:
    """Writes begin and end times of every phase in every block, for one step, into ``folder``."""
    cache = random_cache(config, batch, depth + 64)
    tokens, positions = jnp.full((batch,), 17, jnp.int32), jnp.full((batch,), depth, jnp.int32)
    os.environ["QWEN3_MOE_DECODE_TRACE"] = folder
    step = jax.jit(lambda w, t, p, c: api.decode_step(w, config, t, p, c))
    step(w, tokens, positions, cache).logits.block_until_ready()
    jax.effects_barrier()
    del os.environ["QWEN3_MOE_DECODE_TRACE"]
    return {"batch": batch, "depth": depth, "folder": folder}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=48)
    parser.add_argument("--check", nargs="*", default=["1:100"], help="batch:depth")
    parser.add_argument("--speed", nargs="*", default=["1:0", "1:4096", "8:0"], help="batch:depth")
    parser.add_argument("--trace", nargs="*", default=[], help="batch:depth")
    parser.add_argument("--trace-folder", default="decode-trace")
    parser.add_argument("--vocab", type=int, default=151936)
    args = parser.parse_args()
    config = replace(PRESETS["Qwen3-30B-A3B"], num_hidden_layers=args.layers, vocab_size=args.vocab)
    start = time.perf_counter()
    w = random_weights(config, q4_k_m(config), GGMLType.Q6_K)
    jax.block_until_ready(w)
    results = {"device": jax.devices()[0].device_kind, "jax": jax.__version__, "bytes": w.nbytes}
    print("weights", w.nbytes, round(time.perf_counter() - start, 1), "s", flush=True)
    traced = partial(trace, folder=args.trace_folder)
    for name, function in (("check", check), ("speed", speed), ("trace", traced)):
        for case in getattr(args, name):
            try:
                result = function(w, config, *map(int, case.split(":")))
            except Exception:
                result = {"case": case, "error": traceback.format_exc()[-1500:]}
            print(name, json.dumps(result), flush=True)
            results.setdefault(name, []).append(result)
    stats = jax.devices()[0].memory_stats() or {}
    results["peak_bytes"] = stats.get("peak_bytes_in_use")
    print(json.dumps(results))


if __name__ == "__main__":
    main()
