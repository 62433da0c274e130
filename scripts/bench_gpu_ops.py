"""The Hopper kernels alone at the shapes of Qwen3-30B-A3B: right first, then timed, one row each.

Every row checks values against float32 before it is timed. Times are of a repetition inside one program,
so that they hold what a layer of the model would pay: kernels and the small launches around them. Rows say
the share of memory's bandwidth (--bandwidth) or of the tensor cores (--tflops), whichever is nearer.

A row has --row-seconds. One that does not end is named, the rows so far are written, and the process ends
with status 3 (a kernel that hangs cannot be interrupted); --skip N goes on after it. A wrong value fails
its row alone and makes the status 1. The last line is JSON, and --out keeps it in a file after every row.

    python -m scripts.bench_gpu_ops --out rows.json [--only moe_mlp] [--sizes]

--sizes adds rows with other sizes of the kernels' pieces; --tiny runs everything at small shapes in
Pallas' interpreter, without a GPU.
"""

import argparse
import faulthandler
import itertools
import json
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from qwen3_moe_jax.convert.ggml_types import GGMLType
from qwen3_moe_jax.kernels_pallas.attention import kernel_sm90 as attention_sm90
from qwen3_moe_jax.kernels_pallas.attention import xla as attention_xla
from qwen3_moe_jax.kernels_pallas.gpu.grouped_matmul_config import (
    MAX_FEW_ROWS,
    MatmulConfig,
    few_config,
)
from qwen3_moe_jax.kernels_pallas.gpu.interpreter import interpreter
from qwen3_moe_jax.kernels_pallas.moe_mlp import kernel_sm90 as moe_sm90
from qwen3_moe_jax.kernels_pallas.packed.gpu_tiles import dequantize_tiles
from qwen3_moe_jax.kernels_pallas.packed.stacks import Matrices
from qwen3_moe_jax.kernels_pallas.quantized_matmul import kernel_sm90 as matmul_sm90
from scripts._random_params import random_matrices

SEED = 20261123
MATMUL_NMSE = 1e-6
"""float16 operands measure 1.2e-7 against float64."""
MOE_NMSE = 4e-6
ATTENTION_NMSE = 2e-5
"""Queries, softmax weights and results of 16 bits measure 4e-6."""
CHECKED_TOKENS = 6
ZIPF = 1.2
BFLOAT16 = np.dtype(jnp.bfloat16)
Q4_K, Q6_K = GGMLType.Q4_K, GGMLType.Q6_K
HUNG, WRONG = 3, 1

Step = Callable[..., jax.Array]


@dataclass(frozen=True)
class Row:
    """One measurement.

    Attributes:
      name: op, shape and sizes.
      make: the step (x, *arguments) -> result, its arguments, and (result) -> NMSE.
      bound: of the NMSE.
      nbytes: that a step reads at least.
      operations: floating-point ones of a step.
    """

    name: str
    make: Callable[[], tuple[Step, tuple, Callable[[jax.Array], float]]]
    bound: float
    nbytes: float
    operations: float


@dataclass(frozen=True)
class Shapes:
    """Sizes of the model and of what is run."""

    hidden: int = 2048
    width: int = 768
    experts: int = 128
    used: int = 8
    heads: int = 32
    kv_heads: int = 4
    head_dim: int = 128
    vocabulary: int = 151936
    tokens: tuple[int, ...] = (32, 64, 512, 2048)
    chunks: tuple[tuple[int, int, int], ...] = (
        (1, 512, 0),
        (1, 2048, 0),
        (1, 2048, 30720),
        (32, 512, 0),
        (32, 1, 512),
        (64, 1, 512),
    )
    """Sequences, queries of each, and keys before them."""


TINY = Shapes(256, 256, 5, 2, 4, 2, 64, 320, (3, 70), ((1, 40, 0), (2, 1, 70)))


class Watchdog:
    """Ends the process where a row takes too long, once it has said which."""

    def __init__(self, name: str, seconds: float, report: "Report"):
        self.timer = threading.Timer(seconds, self.bite)
        self.timer.daemon = True
        self.name, self.seconds, self.report = name, seconds, report

    def bite(self) -> None:
        print(f"HUNG: {self.name} had not ended after {self.seconds:g} s", flush=True)
        faulthandler.dump_traceback(file=sys.stdout)
        self.report.facts["hung"] = self.name
        self.report.write()
        print(self.report.json(), flush=True)
        os._exit(HUNG)

    def __enter__(self) -> None:
        self.timer.start()

    def __exit__(self, *_: object) -> None:
        self.timer.cancel()


@dataclass
class Report:
    """The rows so far."""

    facts: dict[str, Any]
    rows: list[dict[str, Any]]
    path: Path | None

    def json(self) -> str:
        return json.dumps({**self.facts, "rows": self.rows})

    def write(self) -> None:
        if self.path:
            self.path.write_text(self.json() + "\n")


def nmse(actual: jax.Array, expected: jax.Array) -> float:
    actual, expected = (np.asarray(a, np.float64) for a in (actual, expected))
    if not np.isfinite(actual).all():
        return float("inf")
    return float(((actual - expected) ** 2).sum() / (expected**2).sum())


def routing(kind: str, tokens: int, shapes: Shapes) -> np.ndarray:
    """int32 [tokens, used]: different experts per token, drawn evenly, by Zipf's law, or the same for all."""
    rng = np.random.default_rng(SEED)
    order = rng.permutation(shapes.experts)
    if kind == "one":
        ids = np.tile(order[: shapes.used], (tokens, 1))
    else:
        exponent = ZIPF if kind == "zipf" else 0.0
        weight = -exponent * np.log(1 + np.arange(shapes.experts))
        drawn = weight + rng.gumbel(size=(tokens, shapes.experts))  # Gumbel's way to draw without returning
        ids = order[np.argsort(-drawn, axis=1)[:, : shapes.used]]
    return ids.astype(np.int32)


@jax.jit
def moe_reference(x, ids, weights, gate: Matrices, up: Matrices, down: Matrices) -> jax.Array:
    """float32 [n, D] of n tokens, one pair of token and expert at a time."""
    dot = partial(jnp.dot, precision=lax.Precision.HIGHEST)

    def pair(args):
        x, expert, weight = args
        g, u, d = (dequantize_tiles(w.matrix(expert)) for w in (gate, up, down))
        return weight * dot(d, jax.nn.silu(dot(g, x)) * dot(u, x))

    pairs = (jnp.repeat(x, ids.shape[1], axis=0), ids.reshape(-1), weights.reshape(-1))
    return lax.map(pair, pairs).reshape(*ids.shape, -1).sum(axis=1)


def stack(seed: int, type: GGMLType, *shape: int) -> Matrices:
    """Random matrices [E, N, K] or [N, K] in tiles."""
    *experts, rows, columns = shape
    return Matrices(random_matrices(seed, type, int(np.prod(experts)) * rows, columns), jnp.int32(0), shape)


def packed_nbytes(w: Matrices) -> int:
    return sum(a.nbytes for a in w.stack.arrays.values())


def moe_row(s: Shapes, tokens: int, kind: str, down_type: GGMLType, config, interpret, label="") -> Row:
    ids = routing(kind, tokens, s)
    share = len(np.unique(ids)) / s.experts
    shapes = {
        "gate": (Q4_K, s.experts, s.width, s.hidden),
        "up": (Q4_K, s.experts, s.width, s.hidden),
        "down": (down_type, s.experts, s.hidden, s.width),
    }
    bits = {Q4_K: 148 / 256, Q6_K: 210 / 256}
    nbytes = share * sum(bits[shape[0]] * np.prod(shape[1:]) for shape in shapes.values())

    def make():
        stacks = tuple(stack(i, *shape) for i, shape in enumerate(shapes.values()))
        x = jax.random.normal(jax.random.key(SEED), (tokens, s.hidden), jnp.float32)
        weights = jax.nn.softmax(jax.random.normal(jax.random.key(1), ids.shape, jnp.float32))
        checked = np.unique(np.linspace(0, tokens - 1, CHECKED_TOKENS).astype(int))

        def step(x, ids, weights, *stacks):
            run = partial(moe_sm90.moe_mlp, config=config, interpret=interpret)
            return run(x, *stacks, ids, weights, BFLOAT16, False)[0]

        def error(out: jax.Array) -> float:
            return nmse(out[checked], moe_reference(x[checked], ids[checked], weights[checked], *stacks))

        return step, (x, jnp.asarray(ids), weights, *stacks), error

    name = f"moe_mlp {tokens} tokens {kind} down {down_type.name}{label}"
    return Row(name, make, MOE_NMSE, nbytes, 6.0 * tokens * s.used * s.width * s.hidden)


def matmul_row(s: Shapes, matrix: str, tokens: int, interpret, config=None, splits=1, label="") -> Row:
    width, kv = s.heads * s.head_dim, s.kv_heads * s.head_dim
    rows, columns, type = {
        "q_proj": (width, s.hidden, Q4_K),
        "k_proj": (kv, s.hidden, Q4_K),
        "v_proj": (kv, s.hidden, Q6_K),
        "o_proj": (s.hidden, width, Q4_K),
        "lm_head": (s.vocabulary, s.hidden, Q6_K),
    }[matrix]

    def make():
        w = stack(7, type, rows, columns)
        x = jax.random.normal(jax.random.key(SEED), (tokens, columns), jnp.float32)
        some = min(tokens, CHECKED_TOKENS)

        def step(x, w):
            run = partial(matmul_sm90.quantized_matmul, config=config, splits=splits, interpret=interpret)
            return run(x, w, BFLOAT16)

        def error(out: jax.Array) -> float:
            ends = [(0, min(rows, 256)), (rows - 64, 64)]
            dense = [dequantize_tiles(w.slice(*end)) for end in ends]
            parts = [out[-some:, first : first + count] for first, count in ends]
            expected = [jnp.dot(x[-some:], d.T, precision=lax.Precision.HIGHEST) for d in dense]
            return nmse(jnp.concatenate(parts, axis=1), jnp.concatenate(expected, axis=1))

        return step, (x, w), error

    nbytes = rows * columns * (148 if type is Q4_K else 210) / 256
    operations = 2.0 * tokens * rows * columns
    return Row(f"quantized_matmul {matrix} {tokens} tokens{label}", make, MATMUL_NMSE, nbytes, operations)


def attention_row(s: Shapes, chunk: tuple[int, int, int], kind: str, interpret) -> Row:
    """``kind``: "kernel", or "cuDNN" over the same keys: causal without keys before, else all of them."""
    batch, queries, before = chunk
    keys = before + queries
    shape = lambda n, heads: (batch, n, heads, s.head_dim)

    def make():
        q = jax.random.normal(jax.random.key(1), shape(queries, s.heads), jnp.bfloat16)
        k, v = (jax.random.normal(jax.random.key(i), shape(keys, s.kv_heads), jnp.bfloat16) for i in (2, 3))
        room = ((0, 0), (0, -keys % 64), (0, 0), (0, 0))  # a cache has slots to spare
        cache = [jnp.pad(a, room)[None] for a in (k, v)]
        positions = jnp.broadcast_to(before + jnp.arange(queries, dtype=jnp.int32), (batch, queries))

        def kernel(q, k, v, positions):
            options = {"interpret": interpret} if interpret else {}
            return attention_sm90.attention(q, k, v, positions, jnp.int32(0), **options)

        def cudnn(q, k, v, positions):
            del positions
            chosen = None if interpret else "cudnn"
            return jax.nn.dot_product_attention(q, k, v, is_causal=before == 0, implementation=chosen)

        def error(out: jax.Array) -> float:
            if kind == "cuDNN" and before:
                return 0.0  # it sees keys that it should not: timed only
            at = positions[:1, -CHECKED_TOKENS:]
            wide = [a[None, :1].astype(jnp.float32) for a in (k, v)]
            few = q[:1, -CHECKED_TOKENS:].astype(jnp.float32)
            return nmse(out[:1, -CHECKED_TOKENS:], attention_xla.attention(few, *wide, at, jnp.int32(0)))

        if kind == "kernel":
            return kernel, (q, *cache, positions), error
        return cudnn, (q, k, v, positions), error

    seen = queries * (before + (queries + 1) / 2)
    operations = 4.0 * batch * seen * s.heads * s.head_dim
    name = f"attention {batch} x {queries} after {before} {kind}"
    nbytes = 4.0 * batch * keys * s.kv_heads * s.head_dim
    return Row(name, make, ATTENTION_NMSE, nbytes, operations)


def other_sizes(s: Shapes, interpret) -> Iterator[Row]:
    """Rows for the choice of sizes."""
    for tokens in s.tokens:
        if tokens <= MAX_FEW_ROWS:
            few = few_config(tokens)
            if interpret:
                few = replace(few, blocks=3)
            options = {
                "2 warpgroups": replace(few, warpgroups=2, in_flight=1),
                "exchange": replace(few, exchange=True, in_flight=1),
                "wait for each product": replace(few, in_flight=0),
                "2 stages of weights": replace(few, weight_stages=2),
                "sorted": MatmulConfig(tile=64, widths=(32, 64), blocks=few.blocks),
            }
            if tokens > 32:
                del options["wait for each product"]  # it is what is chosen
        elif tokens * s.used / s.experts <= 48:
            options = {"4 warpgroups": MatmulConfig(64, (32, 64), 1, 4)}
        else:
            options = {
                "tile 256, widths 128 192 256": MatmulConfig(256, (128, 192, 256), 1),
                "tile 256, widths 128 160 256": MatmulConfig(256, (128, 160, 256), 1),
            }
        for label, config in options.items():
            config = replace(config, blocks=3) if interpret else config
            yield moe_row(s, tokens, "even", Q6_K, config, interpret, f", {label}")


def all_rows(s: Shapes, interpret, sizes: bool) -> Iterator[Row]:
    """Cheap ones that tell most first; those of sizes that have run before, before others."""
    tiny = MatmulConfig(16, (8, 16), blocks=2) if interpret else None
    for tokens, matrix in itertools.product(s.tokens, ("q_proj", "k_proj", "v_proj", "o_proj", "lm_head")):
        if (matrix == "lm_head" and tokens > MAX_FEW_ROWS) or (matrix == "v_proj" and tokens != s.tokens[0]):
            continue
        yield matmul_row(s, matrix, tokens, interpret, tiny)
    for tokens, kind in itertools.product(reversed(s.tokens), ("even", "zipf", "one")):
        config = tiny and (replace(few_config(tokens), blocks=3) if tokens <= MAX_FEW_ROWS else tiny)
        yield moe_row(s, tokens, kind, Q4_K, config, interpret)
        if kind == "even":
            yield moe_row(s, tokens, kind, Q6_K, config, interpret)
    for chunk, kind in itertools.product(s.chunks, ("kernel", "cuDNN")):
        yield attention_row(s, chunk, kind, interpret)
    if sizes:
        yield from other_sizes(s, interpret)


def run_row(row: Row, args: argparse.Namespace) -> dict[str, Any]:
    step, arguments, error = row.make()

    @jax.jit
    def repeated(x, *others):
        def again(_, carry):
            x, _ = carry
            out = step(x, *others)
            # The next step depends on this one, and x stays what it was.
            return x + (out.reshape(-1)[0] * 1e-30).astype(x.dtype), out

        shape = jax.eval_shape(step, x, *others)
        return lax.fori_loop(0, args.repeats, again, (x, jnp.zeros(shape.shape, shape.dtype)))

    began = time.perf_counter()
    out = jax.block_until_ready(repeated(*arguments))[1]
    compiled = time.perf_counter() - began
    wrong = error(out)
    result = {"name": row.name, "nmse": wrong, "compile_s": round(compiled, 2)}
    if not wrong <= row.bound:
        return {**result, "failed": f"NMSE {wrong:.3g} above {row.bound:g}"}
    seconds = []
    for _ in range(args.timings):
        began = time.perf_counter()
        jax.block_until_ready(repeated(*arguments))
        seconds.append((time.perf_counter() - began) / args.repeats)
    best = min(seconds)
    limits = {
        "memory": row.nbytes / args.bandwidth / 1e12,
        "tensor cores": row.operations / args.tflops / 1e12,
    }
    limit = max(limits, key=limits.get)
    return {
        **result,
        "microseconds": round(best * 1e6, 1),
        "limit": limit,
        "limit_microseconds": round(limits[limit] * 1e6, 1),
        "share": round(limits[limit] / best, 3),
        "teraflops": round(row.operations / best / 1e12, 1),
        "terabytes_per_second": round(row.nbytes / best / 1e12, 3),
    }


def describe(result: dict[str, Any]) -> str:
    if "failed" in result:
        return f"FAILED {result['name']}: {result['failed']}"
    return (
        f"{result['name']:64} {result['microseconds']:9.1f} us  {result['share']:6.1%} of {result['limit']}  "
        f"{result['terabytes_per_second']:6.3f} TB/s {result['teraflops']:6.1f} TFLOP/s  "
        f"NMSE {result['nmse']:.1e}  first {result['compile_s']:.1f} s"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="*", default=[""], help="rows whose name holds one of these")
    parser.add_argument("--skip", type=int, default=0, help="leave out this many rows at the beginning")
    parser.add_argument("--sizes", action="store_true", help="also other sizes of the kernels' pieces")
    parser.add_argument("--repeats", type=int, default=50, help="repeats per program")
    parser.add_argument("--timings", type=int, default=3, help="runs of a program, of which the best counts")
    parser.add_argument("--row-seconds", type=float, default=60.0)
    parser.add_argument("--seconds", type=float, default=float("inf"), help="begin no row after this time")
    parser.add_argument("--bandwidth", type=float, default=3.0, help="TB/s that a copy on the card reaches")
    parser.add_argument("--tflops", type=float, default=798.0, help="what the card's matrix product reaches")
    parser.add_argument("--tiny", action="store_true", help="small shapes in Pallas' interpreter")
    parser.add_argument("--out", type=Path, help="keep the JSON here, after every row")
    parser.add_argument("--list", action="store_true", help="name the rows and stop")
    args = parser.parse_args()
    interpret = None
    if args.tiny:
        interpret, args.repeats, args.timings = interpreter(), 1, 1
    shapes = TINY if args.tiny else Shapes()
    rows = [r for r in all_rows(shapes, interpret, args.sizes) if any(o in r.name for o in args.only)]
    rows = list(enumerate(rows))[args.skip :]
    if args.list:
        print(*(f"{i:3} {row.name}" for i, row in rows), sep="\n")
        return
    report = Report(
        {"device": jax.devices()[0].device_kind, "jax": jax.__version__, "seed": SEED}, [], args.out
    )
    print(f"{report.facts['device']}: {len(rows)} rows", flush=True)
    began = time.perf_counter()
    for i, row in rows:
        if time.perf_counter() - began > args.seconds:
            report.facts["not_begun"] = [row.name for _, row in rows[i - args.skip :]]
            print(f"no time left for {len(report.facts['not_begun'])} rows", flush=True)
            break
        with Watchdog(f"row {i}, {row.name}", args.row_seconds, report):
            try:
                result = run_row(row, args)
            except (RuntimeError, ValueError) as error:  # not taken, no memory, no cuDNN
                result = {"name": row.name, "failed": f"{type(error).__name__}: {error}".splitlines()[0]}
        report.rows.append(result)
        report.write()
        print(f"{i:3} {describe(result)}", flush=True)
    print(report.json())
    raise SystemExit(WRONG if any("failed" in row for row in report.rows) else 0)


if __name__ == "__main__":
    main()
