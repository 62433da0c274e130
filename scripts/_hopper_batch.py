"""``compile_for_hopper batch``: a batch's programs, compiled for an H100, must not copy the KV cache.

Prints each program's scratch memory besides its arguments. A program that keeps more than ``--max`` GB has
copied the cache.
"""

import argparse
import functools
import itertools
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp

from qwen3_moe_jax.convert.config import PRESETS
from qwen3_moe_jax.convert.tensor_names import q4_k_m_types
from qwen3_moe_jax.core.lookup import DRAFTS
from qwen3_moe_jax.jax_backend import generate
from qwen3_moe_jax.jax_backend.decode_path import PATHS, Decoder
from qwen3_moe_jax.jax_backend.draft_step import write_draft
from qwen3_moe_jax.jax_backend.generate import PREFILL_CHUNKS, DecodeState
from qwen3_moe_jax.jax_backend.kv_cache import KVCache
from qwen3_moe_jax.jax_backend.one_token import decode_one
from qwen3_moe_jax.jax_backend.params import GPU_ROLES
from qwen3_moe_jax.jax_backend.qwen3_moe import Qwen3Moe
from qwen3_moe_jax.jax_backend.token_choice import GREEDY
from qwen3_moe_jax.loader import KV_CACHES
from scripts._random_params import random_params


def programs(
    args: argparse.Namespace, kv_cache: str, sharding: jax.sharding.Sharding
) -> dict[str, Callable[[], jax.stages.Traced]]:
    """What to trace, by name: decoding, and chunks of ``--prompts`` prompts and of one, also beside it."""
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

    arguments, steps = there((jax.eval_shape(make), jnp.int32(1)))

    def prefill(count: int, chunk: int, rows: int) -> jax.stages.Traced:
        who = there(jnp.zeros(count, jnp.int32))
        return generate.prefill.trace(decoder, *arguments, who, chunk=chunk, rows=rows)

    found = {
        f"decode {slots}": lambda: generate.decode.trace(decoder, *arguments, steps, rows=slots),
        f"decode 1 of {slots}": lambda: generate.decode.trace(decoder, *arguments, steps, rows=1),
        f"one token of {slots}": lambda: decode_one.trace(decoder, *arguments, rows=slots, work=GREEDY),
    }
    if slots == 1:
        draft = there((jnp.zeros(max(DRAFTS), jnp.int32), jnp.int32(1)))
        found["a draft"] = lambda: write_draft.trace(decoder, *arguments, *draft)
    for count, chunk, rows in itertools.product({prompts: 0, 1: 0}, PREFILL_CHUNKS, (slots, 0)):
        name = f"prefill {count} x {chunk}, decode {rows}"
        found[name] = functools.partial(prefill, count, chunk, rows)
    return {name: trace for name, trace in found.items() if args.only in name}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``batch``."""
    parser.add_argument("--preset", default="Qwen3-30B-A3B", choices=sorted(PRESETS))
    parser.add_argument("--slots", type=int, default=32)
    parser.add_argument("--prompts", type=int, default=4, help="that are read at a time")
    parser.add_argument("--only", default="", help="programs whose name holds this")
    parser.add_argument("--context", type=int, default=2048, help="tokens per slot")
    parser.add_argument("--kv-cache", nargs="+", choices=KV_CACHES, default=["float16", "int8"])
    parser.add_argument("--max", type=float, default=0.5, help="GB of scratch without a copy of the cache")


def run(args: argparse.Namespace, sharding: jax.sharding.Sharding) -> int:
    """Compiles every program; returns 1 where one keeps too much."""
    too_much = []
    for kv_cache in args.kv_cache:
        for name, trace in programs(args, kv_cache, sharding).items():
            began = time.perf_counter()
            compiled = trace().lower(lowering_platforms=("cuda",)).compile()
            sizes = compiled.memory_analysis()
            new = sizes.output_size_in_bytes - sizes.alias_size_in_bytes  # of the state nothing is new
            scratch = (sizes.temp_size_in_bytes + new) / 1e9
            seconds = time.perf_counter() - began
            print(f"{kv_cache}, {name}: scratch {scratch:.3f} GB, {seconds:.0f} s", flush=True)
            if scratch > args.max:
                too_much.append(f"{kv_cache}, {name}")
    if too_much:
        print(f"more than {args.max} GB of scratch: {'; '.join(too_much)}")
    return int(bool(too_much))
