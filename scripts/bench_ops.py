"""Speed of the ops on packed weights at the real shapes of Qwen3-30B-A3B, on JAX's default device.

    python -m scripts.bench_ops [--only NAME] [--layout lanes16] [--phases decode1,prefill512] [--list]

Weights are random. Every case is checked against float64 before it is timed, on its first
rows. Times are of whole calls from the host, the best and the median of several; beside them
stand the packed bytes that a call must read (of chosen experts only) over the best time, and
for many tokens the floating-point rate. ``--vector-width`` is XLA's preferred vector width on
the CPU, in bits. The last line is one JSON object.
"""

import argparse
import json
import os
import time
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np

import qwen3_moe_jax.kernels_pallas as ops
from qwen3_moe_jax.convert.ggml_types import BLOCK_FORMATS, GGMLType
from qwen3_moe_jax.convert.layouts import lanes16 as layouts
from qwen3_moe_jax.convert.packed import LANES16, ROWS, PackedTensor
from qwen3_moe_jax.convert.unpack import dequantize, pack
from qwen3_moe_jax.kernels_pallas.attention import arg_specs as attention_specs
from qwen3_moe_jax.kernels_pallas.expert_matmul import arg_specs as expert_specs
from qwen3_moe_jax.kernels_pallas.moe_mlp import arg_specs as moe_specs
from qwen3_moe_jax.kernels_pallas.quantized_matmul import arg_specs as matmul_specs

SEED = 20260923
MAX_NMSE = {"float32": 1e-10, "bfloat16": 5e-5}
REPEAT_SECONDS = 1.5

Case = tuple[str, Callable[..., jax.Array], tuple, int, float, Callable[[np.ndarray], float]]
"""Name, function, arguments, packed bytes read, floating-point operations, NMSE of a result."""


def random_weights(rng: np.random.Generator, type: GGMLType, shape: tuple[int, ...]) -> PackedTensor:
    """Random bytes with finite scales."""
    block = BLOCK_FORMATS[type]
    blocks = rng.integers(0, 256, (int(np.prod(shape)) // block.weights, block.nbytes), dtype=np.uint8)
    for name in ("d", "dmin"):
        if name in block.fields:
            offset = block.fields[name].offset
            scale = rng.uniform(-1e-3, 1e-3, len(blocks)).astype("<f2")
            blocks[:, offset : offset + 2] = scale.view(np.uint8).reshape(-1, 2)
    return pack(blocks.reshape(-1), type, shape)


def place(w: PackedTensor, layout: str) -> PackedTensor:
    return jax.tree.map(jnp.asarray, layouts.to_layout(w, layout))


def nmse(actual: np.ndarray, expected: np.ndarray) -> float:
    return float(((actual.astype(np.float64) - expected) ** 2).sum() / (expected**2).sum())


def routed(rng: np.random.Generator, tokens: int, experts: int, used: int) -> np.ndarray:
    return np.stack([rng.permutation(experts)[:used] for _ in range(tokens)]).astype(np.int32)


def matmul_cases(rng: np.random.Generator, args: argparse.Namespace) -> Iterator[Case]:
    for name, spec in matmul_specs.ARG_SPECS.items():
        if not wanted(f"quantized_matmul {name}", args):
            continue
        w = random_weights(rng, spec.type, (spec.rows, spec.columns))
        x = rng.standard_normal((spec.tokens, spec.columns), dtype=np.float32)
        expected = x[:4].astype(np.float64) @ dequantize(w[:64]).astype(np.float64).T

        def error(y: np.ndarray, expected: np.ndarray = expected) -> float:
            return nmse(y[:4, :64], expected)

        yield (
            f"quantized_matmul {name}",
            lambda x, w: ops.quantized_matmul(x, w, compute_dtype=args.dtype),
            (x, place(w, args.layout)),
            w.nbytes,
            2.0 * spec.tokens * spec.rows * spec.columns,
            error,
        )


def expert_cases(rng: np.random.Generator, args: argparse.Namespace) -> Iterator[Case]:
    for name, spec in expert_specs.ARG_SPECS.items():
        if not wanted(f"expert_matmul {name}", args):
            continue
        w = random_weights(rng, spec.type, (spec.experts, spec.rows, spec.columns))
        ids = routed(rng, spec.tokens, spec.experts, spec.used)
        shape = (spec.tokens, *(() if spec.shared_input else (spec.used,)), spec.columns)
        x = rng.standard_normal(shape, dtype=np.float32)
        first = x[0] if spec.shared_input else x[0, 0]
        expected = dequantize(w[int(ids[0, 0])]).astype(np.float64) @ first

        def error(y: np.ndarray, expected: np.ndarray = expected) -> float:
            return nmse(y[0, 0], expected)

        yield (
            f"expert_matmul {name}",
            lambda x, w, ids: ops.expert_matmul(x, w, ids, compute_dtype=args.dtype),
            (x, place(w, args.layout), ids),
            w.nbytes * len(np.unique(ids)) // spec.experts,
            2.0 * spec.tokens * spec.used * spec.rows * spec.columns,
            error,
        )


def moe_cases(rng: np.random.Generator, args: argparse.Namespace) -> Iterator[Case]:
    for name, spec in moe_specs.ARG_SPECS.items():
        if not wanted(f"moe_mlp {name}", args):
            continue
        shape = (spec.experts, spec.width, spec.hidden)
        gate, up = (random_weights(rng, spec.gate_up_type, shape) for _ in range(2))
        down = random_weights(rng, spec.down_type, (spec.experts, spec.hidden, spec.width))
        ids = routed(rng, spec.tokens, spec.experts, spec.used)
        weights = rng.dirichlet(np.ones(spec.used), spec.tokens).astype(np.float32)
        x = rng.standard_normal((spec.tokens, spec.hidden), dtype=np.float32)
        expected = np.zeros(spec.hidden)
        for e, weight in zip(ids[0], weights[0], strict=True):
            g, u, d = (dequantize(w[int(e)]).astype(np.float64) for w in (gate, up, down))
            expected += weight * (d @ ((g @ x[0]) / (1 + np.exp(-(g @ x[0]))) * (u @ x[0])))

        def error(y: np.ndarray, expected: np.ndarray = expected) -> float:
            return nmse(y[0], expected)

        stacks = tuple(place(w, args.layout) for w in (gate, up, down))
        yield (
            f"moe_mlp {name}",
            lambda x, g, u, d, i, w: ops.moe_mlp(x, g, u, d, i, w, compute_dtype=args.dtype),
            (x, *stacks, ids, weights),
            sum(w.nbytes for w in (gate, up, down)) * len(np.unique(ids)) // spec.experts,
            6.0 * spec.tokens * spec.used * spec.width * spec.hidden,
            error,
        )


def attention_cases(rng: np.random.Generator, args: argparse.Namespace) -> Iterator[Case]:
    for name, spec in attention_specs.ARG_SPECS.items():
        if not wanted(f"attention {name}", args):
            continue
        q = rng.standard_normal((1, spec.tokens, spec.heads, spec.head_dim), dtype=np.float32)
        cache_shape = (1, spec.capacity, spec.kv_heads, spec.head_dim)
        k, v = (np.zeros(cache_shape, jnp.bfloat16) for _ in range(2))
        for cache in (k, v):
            cache[:, : spec.used] = rng.standard_normal((1, spec.used, *cache_shape[2:]), dtype=np.float32)
        positions = np.arange(spec.used - spec.tokens, spec.used, dtype=np.int32)[None]
        keys, values = (cache[0, : spec.used, 0].astype(np.float64) for cache in (k, v))
        scores = np.exp(keys @ q[0, -1, 0] / np.sqrt(spec.head_dim))
        expected = scores @ values / scores.sum()

        def error(y: np.ndarray, expected: np.ndarray = expected) -> float:
            return nmse(y[0, -1, 0], expected)

        pairs = spec.tokens * (spec.used - (spec.tokens - 1) / 2)
        yield (
            f"attention {name}",
            ops.attention,
            (q, k, v, positions),
            2 * spec.used * spec.kv_heads * spec.head_dim * 2,
            4.0 * pairs * spec.heads * spec.head_dim,
            error,
        )


def wanted(name: str, args: argparse.Namespace) -> bool:
    phase = name.rsplit(" ", 1)[1]
    in_phase = any(phase == p or phase.endswith("_" + p) or phase.startswith(p + "_") for p in args.phases)
    if args.list and in_phase and args.only in name:
        print(name)
    return in_phase and args.only in name and not args.list


def measure(case: Case, args: argparse.Namespace) -> dict[str, object]:
    name, function, arguments, nbytes, flops, error = case
    options = {"xla_cpu_prefer_vector_width": args.vector_width} if args.vector_width else None
    arguments = jax.tree.map(jnp.asarray, arguments)
    began = time.perf_counter()
    compiled = jax.jit(function, compiler_options=options).lower(*arguments).compile()
    compile_seconds = time.perf_counter() - began
    wrong = error(np.asarray(compiled(*arguments), np.float32))
    if not wrong <= MAX_NMSE[args.dtype]:
        raise SystemExit(f"{name}: NMSE {wrong:.3g} against float64, above {MAX_NMSE[args.dtype]:g}")
    times: list[float] = []
    stop = time.perf_counter() + args.seconds
    while len(times) < 3 or time.perf_counter() < stop:
        began = time.perf_counter()
        compiled(*arguments).block_until_ready()
        times.append(time.perf_counter() - began)
    best, median = min(times), float(np.median(times))
    scratch = compiled.memory_analysis()
    result = {
        "name": name,
        "best_ms": best * 1e3,
        "median_ms": median * 1e3,
        "packed_gb_per_s": nbytes / best / 1e9,
        "gflop_per_s": flops / best / 1e9,
        "scratch_mb": scratch.temp_size_in_bytes / 1e6 if scratch else None,
        "compile_s": compile_seconds,
        "nmse": wrong,
    }
    print(
        f"{name:42} {best * 1e3:9.3f} ms (median {median * 1e3:9.3f})  {result['packed_gb_per_s']:7.2f} GB/s"
        f"  {result['gflop_per_s']:8.1f} GFLOP/s  compile {compile_seconds:5.2f} s  NMSE {wrong:.1e}",
        flush=True,
    )
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="run cases whose name holds this")
    parser.add_argument("--phases", default="decode1,decode8,prefill512", type=lambda s: s.split(","))
    on_cpu = jax.default_backend() == "cpu"
    parser.add_argument("--layout", choices=(ROWS, LANES16), default=LANES16 if on_cpu else ROWS)
    parser.add_argument("--dtype", choices=tuple(MAX_NMSE), default="float32")
    parser.add_argument("--vector-width", type=int, default=512 if on_cpu else 0)
    parser.add_argument("--seconds", type=float, default=REPEAT_SECONDS, help="time to repeat each case for")
    parser.add_argument("--list", action="store_true", help="name the cases and stop")
    args = parser.parse_args()
    rng = np.random.default_rng(SEED)
    print(f"seed {SEED}, {jax.devices()[0].device_kind}, layout {args.layout}, {args.dtype}")
    results = [
        measure(case, args)
        for cases in (matmul_cases, expert_cases, moe_cases, attention_cases)
        for case in cases(rng, args)
    ]
    facts = {
        "device": jax.devices()[0].device_kind,
        "cpu_count": os.cpu_count(),
        "load_average": os.getloadavg()[0],
        "jax": jax.__version__,
        "layout": args.layout,
        "dtype": args.dtype,
        "vector_width": args.vector_width,
    }
    print(json.dumps({**facts, "results": results}))


if __name__ == "__main__":
    main()
