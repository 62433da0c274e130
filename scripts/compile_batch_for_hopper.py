"""Compiles a batch's programs for an H100 on a machine without one: they must not copy the KV cache.

Needs what ``compile_for_hopper.py`` needs. For each program the scratch memory beside its arguments is
printed; a program that keeps more than ``--most`` GB has copied the cache, and ends this with an error.

    python -m scripts.compile_batch_for_hopper --slots 32 --context 2048 --kv-cache float16 int8
"""

import argparse
import sys
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp

from qwen3_moe_jax.convert.config import PRESETS
from qwen3_moe_jax.convert.tensor_names import q4_k_m_types
from qwen3_moe_jax.jax_backend import generate
from qwen3_moe_jax.jax_backend.decode_path import PATHS, Decoder
from qwen3_moe_jax.jax_backend.generate import PREFILL_CHUNKS, DecodeState
from qwen3_moe_jax.jax_backend.kv_cache import KVCache
from qwen3_moe_jax.jax_backend.model import Qwen3Moe
from qwen3_moe_jax.jax_backend.params import GPU_ROLES
from qwen3_moe_jax.loader import KV_CACHES
from scripts import compile_for_hopper  # sets the platform, so it comes before JAX
from scripts.bench_prefill import random_params


def programs(args: argparse.Namespace, kv_cache: str) -> dict[str, Callable[[], jax.stages.Traced]]:
    """What to trace, by name: decoding, and a chunk of ``--prompts`` prompts beside it."""
    sharding = compile_for_hopper.h100()
    config, slots, prompts = PRESETS[args.preset], args.slots, min(args.prompts, args.slots)
    types = q4_k_m_types(config)
    decoder = Decoder(Qwen3Moe(config, jnp.bfloat16), PATHS)

    def make() -> tuple:
        cache = KVCache.create(config, slots, args.context + PREFILL_CHUNKS[-1], jnp.dtype(kv_cache))
        state = DecodeState.empty(cache, args.context, config.vocab_size)
        return random_params(config, types, GPU_ROLES), jax.tree.map(jnp.asarray, state)

    def there(tree: object) -> object:
        like = lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=sharding)
        return jax.tree.map(like, tree)

    arguments, steps, who = there((jax.eval_shape(make), jnp.int32(1), jnp.zeros(prompts, jnp.int32)))
    chunk, longest = PREFILL_CHUNKS[0], PREFILL_CHUNKS[-1]
    return {
        f"decode {slots}": lambda: generate.decode.trace(decoder, *arguments, steps, rows=slots),
        f"decode 1 of {slots}": lambda: generate.decode.trace(decoder, *arguments, steps, rows=1),
        f"prefill {prompts} x {longest}, decode {slots}": lambda: generate.prefill.trace(
            decoder, *arguments, who, chunk=longest, rows=slots
        ),
        f"prefill {prompts} x {chunk}": lambda: generate.prefill.trace(
            decoder, *arguments, who, chunk=chunk, rows=0
        ),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--preset", default="Qwen3-30B-A3B", choices=sorted(PRESETS))
    parser.add_argument("--slots", type=int, default=32)
    parser.add_argument("--prompts", type=int, default=4, help="that are read at a time")
    parser.add_argument("--context", type=int, default=2048, help="tokens of a slot")
    parser.add_argument("--kv-cache", nargs="+", choices=KV_CACHES, default=["float16", "int8"])
    parser.add_argument("--most", type=float, default=0.5, help="GB of scratch without a copy of the cache")
    args = parser.parse_args()
    too_much = []
    with compile_for_hopper.as_on_h100():
        for kv_cache in args.kv_cache:
            for name, trace in programs(args, kv_cache).items():
                began = time.perf_counter()
                compiled = trace().lower(lowering_platforms=("cuda",)).compile()
                scratch = compiled.memory_analysis().temp_size_in_bytes / 1e9
                seconds = time.perf_counter() - began
                print(f"{kv_cache}, {name}: scratch {scratch:.3f} GB, {seconds:.0f} s", flush=True)
                if scratch > args.most:
                    too_much.append(f"{kv_cache}, {name}")
    if too_much:
        sys.exit(f"more than {args.most} GB of scratch: {'; '.join(too_much)}")


if __name__ == "__main__":
    main()
