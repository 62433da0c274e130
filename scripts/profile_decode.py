"""Random packed weights on the device, and a float32 reference for the decode kernel.

The weights have the shapes and bytes of a real file. The kernel is checked against the reference with the
experts that it chose, must give the same bits again and alone, and is timed:

    python -m scripts.profile_decode --check 8:200 --speed 8:0

``--blocks N`` runs N blocks, as on a card of N multiprocessors:

    python -m scripts.profile_decode --blocks 112 --layers 12 --vocab 8192 --check 1:300 8:200 --speed 1:0 8:0

``--without PART`` times the kernel with a part of its work left out and the experts given, which says what
the part costs; ``--without nothing`` is what to compare with:

    python -m scripts.profile_decode --without gate_up --check --speed 8:0 --layers 12 --vocab 8192

``--one-sequence`` checks and times tokens of one sequence, as a draft is read, not of several sequences.

Results are printed as they come, the last line is JSON. A case that hangs ends the run after --limit seconds
with the Python stacks. ``--tiny`` runs the same in Pallas' interpreter on a CPU. For the figures of a file
see ``scripts.bench_decode``.
"""

import argparse
import faulthandler
import json
import os
import time
import traceback
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from unittest import mock

# Nothing here gains from tuning of XLA's own products, and it takes minutes.
os.environ["XLA_FLAGS"] = f"--xla_gpu_autotune_level=0 {os.environ.get('XLA_FLAGS', '')}"

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from qwen3_moe_jax.convert.config import PRESETS
from qwen3_moe_jax.convert.ggml_types import GGMLType
from qwen3_moe_jax.convert.packed import PackedTensor
from qwen3_moe_jax.convert.tensor_names import q4_k_m_types
from qwen3_moe_jax.jax_backend.params import GPU_ROLES
from qwen3_moe_jax.kernels_pallas.decode_step import api
from qwen3_moe_jax.kernels_pallas.decode_step.activations import Activations
from qwen3_moe_jax.kernels_pallas.decode_step.experts import Experts
from qwen3_moe_jax.kernels_pallas.decode_step.formats import ROW_FORMATS, TILE_FORMATS
from qwen3_moe_jax.kernels_pallas.decode_step.primitives.layouts import TILE_LANES, full
from qwen3_moe_jax.kernels_pallas.decode_step.projections import Products
from qwen3_moe_jax.kernels_pallas.decode_step.router import Router
from qwen3_moe_jax.kernels_pallas.decode_step.tile_formats import SHAPE
from qwen3_moe_jax.kernels_pallas.decode_step.weights import ROUTER, StepWeights, column_names
from qwen3_moe_jax.kernels_pallas.embedding_lookup.api import embedding_lookup
from qwen3_moe_jax.kernels_pallas.gpu.device import multiprocessors
from qwen3_moe_jax.kernels_pallas.gpu.interpreter import interpreter
from qwen3_moe_jax.kernels_pallas.norm_rope.api import rope, rope_tables
from qwen3_moe_jax.kernels_pallas.packed.dequantize import dequantize
from qwen3_moe_jax.kernels_pallas.packed.stacks import rows_per_unit
from scripts._decode_caches import after, random_cache, real_values, step
from scripts._random_params import random_params


def mixed(config) -> dict[str, GGMLType]:
    """Types that a Q4_K_M file lacks, and layers that differ in all roles."""
    t = GGMLType
    kinds = ({"v_proj": t.Q8_0, "down_proj": t.Q8_0}, {"down_proj": t.Q5_K})
    types = {}
    for path, kind in q4_k_m_types(config).items():
        if path == "lm_head":
            types[path] = t.Q8_0
        elif kind is t.F32 or not path.startswith("layers."):
            types[path] = kind
        else:
            odd = int(path.split(".")[1]) % 2
            types[path] = kinds[odd].get(path.rpartition(".")[2], (t.Q5_K, t.Q8_0)[odd])
    return types


def all_of(kind: GGMLType, config) -> dict[str, GGMLType]:
    """Every matrix but the router and the embedding in one type."""
    types = q4_k_m_types(config)
    return {path: old if old is GGMLType.F32 else kind for path, old in types.items()}


TYPES = {kind.name.lower(): partial(all_of, kind) for kind in ROW_FORMATS}
TYPES |= {"q4_k_m": q4_k_m_types, "mixed": mixed}
"""Quantization types of all tensors."""

SHAPES = {
    "full": {},
    "embedded": dict(
        hidden_size=256, num_attention_heads=8, num_key_value_heads=2, head_dim=64,
        num_experts=16, num_experts_per_tok=4, moe_intermediate_size=256,
    ),
    "odd": {"hidden_size": 2304, "num_attention_heads": 24},
}  # fmt: skip
"""Sizes beside those of Qwen3-30B-A3B: the embedded model's, and columns and heads of no whole span."""


# The reference: float32 dequantization, one matrix at a time.


def matvec(stack: PackedTensor, start, tiles, x):
    """Sums of products, no dot: XLA would try out ways to multiply at every shape."""
    unit = rows_per_unit(stack.layout)
    first, count = start * 8 // unit, tiles * 8 // unit
    part = {k: lax.dynamic_slice_in_dim(v, first, count) for k, v in stack.arrays.items()}
    return jnp.sum(dequantize(PackedTensor(part, stack.type, stack.layout)) * x, axis=-1)


def rms(x, w, eps):
    return x * lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + eps) * w


@partial(jax.jit, static_argnames=("c", "kinds"))
def reference_layer(params, c, kinds: tuple, layer, at: dict, x, position, keys, values, ids):
    """One layer of plain float32 decoding of one sequence: compiled once for layers of the same types.

    Args:
      kinds: (tiles of q, k, v in each of their types, index of o's type, of gate and up's, of down's).
      at: the layer's columns of the table.
      keys, values: [L, S, K, H], of which the first ``position`` positions are used.
      ids: int32 [X], the experts.

    Returns:
      x, and how many of the experts the reference would not have chosen.
    """
    counts, o_type, gate_type, down_type = kinds
    stacks, norm = StepWeights.of(params).stacks, lambda name: params["layers"][name].options[0][layer]
    h = rms(x, norm("input_layernorm"), c.rms_norm_eps)
    y = jnp.concatenate([
        matvec(stack, at[f"qkv_offset{t}"], counts[t], h)
        for t, stack in enumerate(stacks["qkv"]) if counts[t]
    ])  # fmt: skip
    n, kv = c.head_dim, c.num_key_value_heads
    take = lambda name, heads: lax.dynamic_slice_in_dim(y, at[name] * n, heads * n).reshape(heads, n)
    q, k, v = take("q_head", c.num_attention_heads), take("k_head", kv), take("v_head", kv)
    cos, sin = rope_tables(position[None], n, c.rope_theta)
    q = rope(rms(q, norm("self_attn.q_norm"), c.rms_norm_eps)[None], cos, sin)[0]
    k = rope(rms(k, norm("self_attn.k_norm"), c.rms_norm_eps)[None], cos, sin)[0]
    put = lambda old, new: old[layer].astype(jnp.float32).at[position].set(new)
    keys, values = put(keys, k), put(values, v)
    q = q.reshape(kv, -1, n)
    scores = jnp.sum(q[:, :, None] * jnp.moveaxis(keys, 0, 1)[:, None], axis=-1) * n**-0.5
    p = jax.nn.softmax(jnp.where(jnp.arange(len(keys)) <= position, scores, -jnp.inf), axis=-1)
    attended = jnp.sum(p[..., None] * jnp.moveaxis(values, 0, 1)[:, None], axis=2).reshape(-1)
    hidden = c.hidden_size // 8
    x = x + matvec(stacks["o"][o_type], at["o_offset"], hidden, attended)

    h = rms(x, norm("post_attention_layernorm"), c.rms_norm_eps)
    router = params["layers"][ROUTER].options[0].arrays["w"].reshape(-1, c.num_experts, c.hidden_size)
    logits = jnp.sum(router[layer] * h, axis=-1)
    own = lax.top_k(logits, len(ids))[1]
    weights, per_expert = jax.nn.softmax(logits[ids]), c.moe_intermediate_size // 8

    def expert(j, x):
        rows = at["gate_up_offset"] + ids[j] * per_expert
        of = lambda role: matvec(stacks[role][gate_type], rows, per_expert, h)
        act, rows = jax.nn.silu(of("gate")) * of("up"), at["down_offset"] + ids[j] * hidden
        return x + weights[j] * matvec(stacks["down"][down_type], rows, hidden, act)

    return lax.fori_loop(0, len(ids), expert, x), jnp.sum(~jnp.isin(own, ids))


@partial(jax.jit, static_argnames="c")
def reference_logits(params, c, x):
    return matvec(params["lm_head"], 0, c.vocab_size // 8, rms(x, params["norm"], c.rms_norm_eps))


def reference(params, c, token, position, keys, values, expert_ids):
    """Logits float32 [V] of one sequence's next token with these experts [L, X], and how many of them it
    would not have chosen."""
    weights = StepWeights.of(params)
    columns, table = column_names(len(weights.types["qkv"])), weights.table
    x = embedding_lookup(params["embed_tokens"], token[None])[0]
    moved = 0
    for i in range(c.num_hidden_layers):
        at = {name: int(table[i, column]) for name, column in columns.items()}
        counts = tuple(at[f"qkv_count{t}"] for t in range(len(weights.types["qkv"])))
        kinds = (counts, at["o_type"], at["gate_up_type"], at["down_type"])
        x, more = reference_layer(params, c, kinds, i, at, x, position, keys, values, expert_ids[i])
        moved += more
    return reference_logits(params, c, x), int(moved)


def cosine(a, b) -> float:
    a, b = np.asarray(a, np.float64).ravel(), np.asarray(b, np.float64).ravel()
    return float(a @ b / (np.linalg.norm(a) * np.linalg.norm(b)))


@partial(jax.jit, static_argnames=("config", "device", "one_sequence"))
def one_step(w, config, device, tokens, positions, cache, one_sequence=False):
    return step(w, config, tokens, positions, cache, one_sequence=one_sequence, device=device)


def check_rows(w, config, rows, depth, *, device, dtype) -> dict:
    """Equality of bits: of tokens of one sequence at once and one after the other, and of two runs."""
    tokens = jnp.asarray(np.random.default_rng(5).integers(0, config.vocab_size, rows), jnp.int32)
    positions = depth + jnp.arange(rows, dtype=jnp.int32)
    cache, run = random_cache(config, 1, depth + 64, dtype), partial(one_step, w, config, device)
    one, two = (run(tokens, positions, cache, one_sequence=True) for _ in range(2))
    same = []
    for row in range(rows):
        alone = run(tokens[row : row + 1], positions[row : row + 1], cache)
        cache = after(alone)
        same.append(bool((alone.logits[0] == one.logits[row]).all()))
    return {
        "rows": rows, "depth": depth,
        "same_bits": bool((one.logits == two.logits).all()),
        "same_bits_as_alone": same,
        "same_cache": all(bool((a == b).all()) for a, b in zip(after(one), cache, strict=True)),
    }  # fmt: skip


def check(w, config, batch, depth, *, device, dtype) -> dict:
    """Cosine of the first sequence to the reference with the kernel's experts, and equality of bits: of two
    runs and with batch 1."""
    rng = np.random.default_rng(5)
    tokens = jnp.asarray(rng.integers(0, config.vocab_size, batch), jnp.int32)
    positions = jnp.asarray([max(depth - 7 * i, 0) for i in range(batch)], jnp.int32)
    cache = random_cache(config, batch, depth + 64, dtype)
    run = partial(one_step, w, config, device)
    start = time.perf_counter()
    one = jax.block_until_ready(run(tokens, positions, cache))
    seconds = time.perf_counter() - start
    two = run(tokens, positions, cache)
    out = {
        "batch": batch, "depth": depth, "compile_s": round(seconds, 1),
        "finite": bool(jnp.isfinite(one.logits).all()),
        "same_bits": bool((one.logits == two.logits).all()),
    }  # fmt: skip
    if batch > 1:
        alone = run(tokens[:1], positions[:1], tuple(a[:, :1] for a in cache))
        out["same_bits_as_batch_1"] = bool((alone.logits[0] == one.logits[0]).all())
    print(json.dumps(out), flush=True)
    start = time.perf_counter()
    keys, values = real_values(tuple(a[:, 0] for a in cache))
    expected, moved = reference(w, config, tokens[0], positions[0], keys, values, one.expert_ids[:, 0])
    return out | {
        "cosine_replayed": round(cosine(one.logits[0], expected), 7),
        "experts_unlike_reference": moved, "reference_s": round(time.perf_counter() - start, 1),
    }  # fmt: skip


def no_products(phase: str) -> None:
    """Products of a phase become zeros, so that compilers drop the reading of their weights too."""
    original = getattr(Experts, phase)

    def zeros(tiles, x):
        del x
        return [full(SHAPE, 0.0, jnp.float32, TILE_LANES) for _ in tiles]

    def without(self, *args):
        with ExitStack() as stack:
            for fmt in {*TILE_FORMATS.values(), *ROW_FORMATS.values()}:
                stack.enter_context(mock.patch.object(fmt, "multiply", zeros))
            return original(self, *args)

    setattr(Experts, phase, without)


def nothing(self, *args, **kwargs) -> None:
    """In place of a method of the kernel."""


def only_signal(self, layer, count) -> None:
    self.g.wait(count)
    self.g.signal()


def only_signal_of_owners(self, norm_ref, layer, count) -> None:
    del norm_ref
    self.g.for_own(0, self.c.batch, lambda b: only_signal(self, layer, count))


WITHOUT = {
    "nothing": lambda: None,
    "gate_up": partial(no_products, "gate_up"),
    "down": partial(no_products, "down"),
    "dense": partial(setattr, Products, "multiply_into_sums", nothing),
    "copies": partial(setattr, Activations, "fetch", nothing),
    "router": partial(setattr, Router, "router", only_signal),
    "norm": partial(setattr, Activations, "share_normed", only_signal_of_owners),
}
"""What ``--without`` leaves out of the kernel. The results are wrong then."""


def given_experts(config, batch: int):
    """Different experts for each token, int32 [L, B, X]: as evenly as a random model chooses."""
    rng = np.random.default_rng(7)
    shape = (config.num_hidden_layers, batch, config.num_experts)
    order = rng.permuted(np.broadcast_to(np.arange(config.num_experts), shape), axis=-1)
    return jnp.asarray(order[..., : config.num_experts_per_tok], jnp.int32)


def decode_many(w, config, tokens, positions, cache, steps: int, device, expert_ids=None, one_sequence=False):
    """``steps`` greedy tokens of every sequence in one dispatch: tokens [steps, B] and the cache.

    With given experts every step has the same tokens, whatever its results are.
    """

    def one(i, carry):
        written, last, cache = carry
        options = {"expert_ids": expert_ids, "one_sequence": one_sequence, "device": device}
        out = step(w, config, last, positions + i, cache, **options)
        chosen = jnp.argmax(out.logits, axis=-1).astype(jnp.int32)
        last = chosen if expert_ids is None else jnp.where(chosen < 0, chosen, last)
        return lax.dynamic_update_slice(written, last[None], (i, 0)), last, after(out)

    written = jnp.zeros((steps, len(tokens)), jnp.int32)
    written, _, cache = lax.fori_loop(0, steps, one, (written, tokens, cache))
    return written, cache


def speed(w, config, batch, depth, *, device, dtype, steps=64, repeats=4, given=False, one=False) -> dict:
    """Tokens per second, best and median of several dispatches; with ``given`` experts or free ones; of
    several sequences, or of ``one``."""
    tokens = jnp.arange(batch, dtype=jnp.int32) * 1000 % config.vocab_size + 17
    positions = jnp.full((batch,), depth, jnp.int32) + one * jnp.arange(batch)
    cache = random_cache(config, 1 if one else batch, depth + steps + batch, dtype)
    ids = given_experts(config, batch) if given else None
    run = jax.jit(
        lambda w, t, p, c: decode_many(w, config, t, p, c, steps, device, ids, one), donate_argnums=(3,)
    )
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
        "us_per_layer": round(median / steps / config.num_hidden_layers * 1e6, 2),
        "tok_s": round(batch * steps / median, 1), "best_tok_s": round(batch * steps / times[0], 1),
    }  # fmt: skip


def trace(w, config, batch, depth, *, device, dtype, folder) -> dict:
    """Writes begin and end times of every phase in every block, for one step, into ``folder``.

    The times go through shared memory: with 8 sequences there is room for those of about 12 layers.
    """
    Path(folder).mkdir(parents=True, exist_ok=True)
    cache = random_cache(config, batch, depth + 64, dtype)
    tokens, positions = jnp.full((batch,), 17, jnp.int32), jnp.full((batch,), depth, jnp.int32)
    device = replace(device, trace_folder=folder)
    one_step(w, config, device, tokens, positions, cache).logits.block_until_ready()
    jax.effects_barrier()
    return {"batch": batch, "depth": depth, "folder": folder}


def tiny(config):
    """The smallest shapes that the kernel takes, for the interpreter."""
    return replace(
        config, num_hidden_layers=1, vocab_size=64, num_attention_heads=16, num_key_value_heads=2,
        num_experts=8, num_experts_per_tok=4, moe_intermediate_size=256,
    )  # fmt: skip


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--layers", type=int, default=48)
    parser.add_argument("--vocab", type=int, default=151936)
    parser.add_argument("--types", choices=sorted(TYPES), default="q4_k_m")
    parser.add_argument("--shape", choices=sorted(SHAPES), default="full")
    parser.add_argument("--cache-dtype", choices=("float16", "bfloat16", "int8"), default="float16")
    parser.add_argument("--check", nargs="*", default=["1:100"], help="batch:depth")
    parser.add_argument("--speed", nargs="*", default=["1:0", "1:4096", "8:0", "16:0"], help="batch:depth")
    blocks = "blocks of the grid, a multiple of 4; the device's multiprocessors by default"
    parser.add_argument("--blocks", type=int, help=blocks)
    parser.add_argument("--kernels", choices=("hopper", "portable"), help="the device's own by default")
    parser.add_argument("--one-sequence", action="store_true", help="all tokens are one sequence's")
    parser.add_argument("--trace", nargs="*", default=[], help="batch:depth")
    parser.add_argument("--trace-folder", default="decode-trace")
    parser.add_argument("--without", choices=WITHOUT, help="leave a part out, and give the experts")
    parser.add_argument("--steps", type=int, default=64, help="tokens per dispatch of speed")
    parser.add_argument("--limit", type=float, default=120, help="seconds of one case")
    parser.add_argument("--tiny", action="store_true", help="smallest shapes in the interpreter")
    return parser.parse_args()


def main() -> None:
    args = parse()
    faulthandler.dump_traceback_later(args.limit, exit=True)
    config = replace(PRESETS["Qwen3-30B-A3B"], num_hidden_layers=args.layers, vocab_size=args.vocab)
    config = replace(config, **SHAPES[args.shape])
    device = api.Device.of(jax.devices()[0], args.kernels, args.blocks or multiprocessors())
    if args.tiny:
        config = tiny(config)
        options = {"kernels": device.kernels, "emulate": True, "interpret": interpreter()}
        device = api.Device(blocks=1, splits=2, **options)
    start = time.perf_counter()
    w = jax.block_until_ready(random_params(config, TYPES[args.types](config), GPU_ROLES))
    nbytes = sum(a.nbytes for a in jax.tree.leaves(w))
    results = {
        "device": jax.devices()[0].device_kind, "jax": jax.__version__, "bytes": nbytes,
        "blocks": device.blocks, "kernels": device.kernels, "types": args.types, "shape": args.shape,
        "cache_dtype": args.cache_dtype, "without": args.without, "cases": [],
    }  # fmt: skip
    print("weights", nbytes, round(time.perf_counter() - start, 1), "s", flush=True)
    dtype = jnp.dtype(args.cache_dtype)
    WITHOUT[args.without or "nothing"]()
    work = {
        "check": check_rows if args.one_sequence else check,
        "speed": partial(speed, steps=args.steps, given=args.without is not None, one=args.one_sequence),
        "trace": partial(trace, folder=args.trace_folder),
    }
    for name, function in work.items():
        for case in getattr(args, name):
            faulthandler.dump_traceback_later(args.limit, exit=True)
            result = {"work": name, "case": case}
            try:
                result |= function(w, config, *map(int, case.split(":")), device=device, dtype=dtype)
            except Exception:  # whatever it is belongs into the report, and the other cases go on
                result["error"] = traceback.format_exc()[-1500:]
            print(json.dumps(result), flush=True)
            results["cases"].append(result)
    faulthandler.cancel_dump_traceback_later()
    stats = jax.devices()[0].memory_stats() or {}
    results["peak_bytes"] = stats.get("peak_bytes_in_use")
    for case in results["cases"]:
        told = case.get("tok_s") or case.get("cosine_replayed") or case.get("same_bits_as_alone")
        told = told or case.get("error", "")[-100:]
        print(f"{case['work']:6} {case['case']:>7} {told}")
    print(json.dumps(results))


if __name__ == "__main__":
    main()
