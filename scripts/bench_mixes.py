"""Decode of full-size models in the mixtures of published files, each against its own memory limit.

    python -m scripts.bench_mixes                                        # six mixtures, 1 and 8 sequences
    python -m scripts.bench_mixes --mixes Q2_K IQ4_XS --kernels portable --rows 1:0 1:4096
    python -m scripts.bench_mixes --tiny                                 # in the interpreter, on a CPU

Weights are random, made on the device, in the types, shapes and bytes that the mixture gives to every tensor.
A mixture is a process of its own: all compile at the same time, before they take memory, then each has the
card in turn. The limit is the bytes that a step reads in the file's own form (even routing) over --bandwidth;
the data sheet's share is beside it. The last line is JSON.
"""

import argparse
import fcntl
import json
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from qwen3_moe_jax.convert.config import PRESETS, Qwen3MoeConfig
from qwen3_moe_jax.convert.ggml_types import GGMLType
from qwen3_moe_jax.convert.tensor_names import TensorSpec, tensor_specs
from qwen3_moe_jax.machine.datasheets import peak_bandwidth
from qwen3_moe_jax.machine.limits import step_nbytes
from qwen3_moe_jax.testing.mixes import mix_types
from qwen3_moe_jax.testing.random_models import tensor_nbytes
from scripts._children import results_of, say

MIXES = ("Q2_K", "Q3_K_M", "IQ4_XS", "Q5_K_M", "Q6_K", "Q8_0")
PRESET = "Qwen3-30B-A3B"
CACHE_ITEMSIZE = 2


@dataclass(frozen=True)
class Mixture:
    """What is asked of an open model, of one that is no file."""

    config: Qwen3MoeConfig
    types: dict[str, GGMLType]
    specs: dict[str, TensorSpec]

    @classmethod
    def of(cls, mix: str, config: Qwen3MoeConfig) -> "Mixture":
        return cls(config, mix_types(mix, config), {s.path: s for s in tensor_specs(config)})

    @property
    def nbytes(self) -> int:
        """Of a file's tensors."""
        return sum(tensor_nbytes(spec.shape, self.types[path]) for path, spec in self.specs.items())


# In the child processes


def child(args: argparse.Namespace) -> None:
    """One mixture: compiles, waits for its turn, makes weights, decodes."""
    import jax
    import jax.numpy as jnp

    from qwen3_moe_jax.jax_backend.params import GPU_ROLES
    from qwen3_moe_jax.kernels_pallas.decode_step import api
    from qwen3_moe_jax.machine.jax_devices import jax_devices
    from scripts import profile_decode  # before any device: it turns off tuning of products
    from scripts._random_params import random_params

    kind = jax_devices()[0].device_kind
    config = PRESETS[PRESET]
    kernels = None if args.kernels == "auto" else args.kernels
    if args.tiny:
        from qwen3_moe_jax.kernels_pallas.gpu.interpreter import interpreter

        config = profile_decode.tiny(config)
        device = api.Device(1, kernels or "portable", splits=2, emulate=True, interpret=interpreter())
    else:
        device = api.Device.of(jax.devices()[0], kernels)
    mixture = Mixture.of(args.mix, config)
    make = lambda: random_params(config, mixture.types, GPU_ROLES)
    abstract = jax.eval_shape(make)
    say(at="begun", device=kind, jax=jax.__version__, kernels=device.kernels, file_bytes=mixture.nbytes)
    programs = {}
    for row in args.rows:
        batch, depth = map(int, row.split(":"))
        began = time.perf_counter()
        run = jax.jit(
            lambda w, t, p, c: profile_decode.decode_many(w, config, t, p, c, args.steps, device),
            donate_argnums=3,
        )
        cache = jax.eval_shape(
            partial(profile_decode.random_cache, config, batch, depth + args.steps, jnp.float16)
        )
        numbers = jax.ShapeDtypeStruct((batch,), jnp.int32)
        programs[row] = run.lower(abstract, numbers, numbers, cache).compile()
        say(at="compiled", row=row, seconds=round(time.perf_counter() - began, 1))
    with Path(args.lock).open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        began = time.perf_counter()
        weights = jax.block_until_ready(make())
        held = sum(a.nbytes for a in jax.tree.leaves(weights))
        say(at="made", seconds=round(time.perf_counter() - began, 1), bytes=held)
        for row, program in programs.items():
            say(**timed(program, weights, mixture, row, args))
        for array in jax.tree.leaves(weights):
            array.delete()


def timed(program: Any, weights: Any, mixture: Mixture, row: str, args: argparse.Namespace) -> dict[str, Any]:
    """Median of several dispatches, and the share of what memory allows."""
    import jax
    import jax.numpy as jnp

    from scripts.profile_decode import random_cache

    batch, depth = map(int, row.split(":"))
    config = mixture.config
    cache = random_cache(config, batch, depth + args.steps, jnp.float16)
    tokens = jnp.arange(batch, dtype=jnp.int32) * 1000 % config.vocab_size
    positions = jnp.full((batch,), depth, jnp.int32)
    seconds, written = [], []
    for _ in range(args.repeats + 1):
        began = time.perf_counter()
        out, cache = jax.block_until_ready(program(weights, tokens, positions, cache))
        seconds.append(time.perf_counter() - began)
        written.append(out)
    median = sorted(seconds[1:])[args.repeats // 2]
    nbytes = step_nbytes(mixture, CACHE_ITEMSIZE, batch, depth)
    rate = batch * args.steps / median
    bandwidth = args.bandwidth * 1e12
    sheet = peak_bandwidth(jax.devices()[0].device_kind)
    step = median / args.steps
    return {
        "row": row,
        "tok_s": round(rate, 1),
        "ms_per_step": round(step * 1e3, 4),
        "step_bytes": round(nbytes),
        "limit_tok_s": round(batch * bandwidth / nbytes),
        "share_of_limit": round(nbytes / bandwidth / step, 3),
        "share_of_data_sheet": round(nbytes / sheet / step, 3) if sheet else None,
        "same_tokens_each_run": all(bool((w == written[0]).all()) for w in written),
    }


# In the parent


def measured(args: argparse.Namespace, mix: str, lock: str, cache: str) -> dict[str, Any]:
    """What the mixture's process says."""
    found: dict[str, Any] = {"mix": mix, "rows": []}
    options = vars(args) | {"mix": mix, "lock": lock}
    for _, line in results_of("bench_mixes", mix, options, cache, args.seconds):
        at = line.pop("at", None)
        if "row" in line and at is None:
            found["rows"].append(line)
        elif at == "compiled":
            found.setdefault("compile_s", {})[line["row"]] = line["seconds"]
        else:
            found |= {"made_s": line.pop("seconds")} | line if at == "made" else line
    return found


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--mixes", nargs="+", default=list(MIXES))
    parser.add_argument("--rows", nargs="+", default=["1:0", "8:0"], metavar="SEQUENCES:DEPTH")
    parser.add_argument("--kernels", choices=("auto", "hopper", "portable"), default="auto")
    parser.add_argument("--steps", type=int, default=64, help="tokens per dispatch")
    parser.add_argument("--repeats", type=int, default=4)
    parser.add_argument("--bandwidth", type=float, default=3.0, help="TB/s that a copy on the card reaches")
    parser.add_argument("--seconds", type=float, default=280, help="after which a process is ended")
    parser.add_argument("--tiny", action="store_true", help="smallest shapes in the interpreter")
    if sys.argv[1:2] == ["--child"]:
        child(argparse.Namespace(**json.loads(sys.argv[3])))
        return 0
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(len(args.mixes)) as pool:
        run = partial(measured, args, lock=f"{folder}/lock", cache=folder)
        found = list(pool.map(run, args.mixes))
    for one in found:
        for row in one["rows"]:
            share = row["share_of_limit"]
            print(f"{one['mix']:8} {row['row']:>6} {row['tok_s']:8} tokens/s, {share} of its limit")
    print(json.dumps({"bandwidth_tb_s": args.bandwidth, "steps": args.steps, "mixes": found}))
    return int(any("error" in one for one in found))


if __name__ == "__main__":
    sys.exit(main())
