"""Speed of many sequences at once on a GPU: prompts together, then tokens for all of them.

The model has random weights in the types of a Q4_K_M file. Every token is chosen on the device
and ``--steps`` of them are one dispatch; the best of several is reported. The limit is that of
memory: the bytes of all weights that a step reads, experts in the number that even routing is
expected to choose, and the cache's, over ``--bandwidth``. The last line is JSON.

    python scripts/bench_batch.py --sequences 32 64 --prompt 512
"""

import argparse
import json
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
sys.path.insert(0, str(Path(__file__).resolve().parent))

import jax
import jax.numpy as jnp
from bench_prefill import chunk_step, random_params, types_of
from flax.core import FrozenDict
from jax import lax

from convert.config import PRESETS, Qwen3MoeConfig
from qwen3_moe_jax.kv_cache import KVCache
from qwen3_moe_jax.model import Qwen3Moe


@partial(jax.jit, static_argnums=(0, 5), donate_argnums=2)
def decode_steps(
    model: Qwen3Moe, params: Any, cache: KVCache, token_ids: jax.Array, start: jax.Array, steps: int
):
    """``steps`` greedy tokens of every sequence: the last ones int32 [B], and the cache.

    Args:
      token_ids: int32 [B], the tokens at position ``start``.
      start: int32 [B].
    """

    def step(i: jax.Array, state: tuple) -> tuple:
        token_ids, cache = state
        output = model.apply({"params": params}, token_ids[:, None], cache, start + i)
        logits = model.apply({"params": params}, output.hidden, method="logits")
        return jnp.argmax(logits[:, 0], axis=-1).astype(jnp.int32), output.cache

    return lax.fori_loop(0, steps, step, (token_ids, cache))


def step_nbytes(config: Qwen3MoeConfig, params: Any, sequences: int, depth: int) -> float:
    """Bytes that one token of all sequences reads at least, where routing is even."""
    missed = (1 - config.num_experts_per_tok / config.num_experts) ** sequences
    total = params["lm_head"].nbytes
    for name, stack in params["stacks"].items():
        used = 1 - missed if "experts" in name else 1.0
        total += used * sum(a.nbytes for a in jax.tree.leaves(stack))
    cached = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * 2
    return total + cached * sequences * depth


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--preset", default="Qwen3-30B-A3B", choices=sorted(PRESETS))
    parser.add_argument("--sequences", type=int, nargs="+", default=[32, 64])
    parser.add_argument("--prompt", type=int, default=512, help="tokens a prompt")
    parser.add_argument("--steps", type=int, default=16, help="tokens a dispatch")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--bandwidth", type=float, default=3.0, help="TB/s that a copy on the card reaches")
    args = parser.parse_args()
    config = PRESETS[args.preset]
    types = types_of(config)
    params = jax.block_until_ready(random_params(config, types))
    model = Qwen3Moe(config, jnp.bfloat16, types=FrozenDict(types))
    results = []
    for sequences in args.sequences:
        shape = (sequences, args.prompt)
        ids = jax.random.randint(jax.random.key(0), shape, 0, config.vocab_size)
        cache = KVCache.create(config, sequences, args.prompt + args.steps * (args.repeats + 1), jnp.bfloat16)
        start = jnp.zeros(sequences, jnp.int32)
        logits, cache = chunk_step(model, params, cache, ids, start)
        tokens = jnp.argmax(logits, axis=-1).astype(jnp.int32)
        start, best = start + args.prompt, float("inf")
        for repeat in range(args.repeats + 1):
            jax.block_until_ready((tokens, cache))
            began = time.perf_counter()
            tokens, cache = decode_steps(model, params, cache, tokens, start, args.steps)
            jax.block_until_ready(tokens)
            if repeat:  # the first run compiles
                best = min(best, (time.perf_counter() - began) / args.steps)
            start = start + args.steps
        floor = step_nbytes(config, params, sequences, args.prompt) / (args.bandwidth * 1e12)
        results.append(
            {
                "sequences": sequences,
                "depth": args.prompt,
                "milliseconds_a_step": round(best * 1e3, 3),
                "tokens_per_second": round(sequences / best),
                "share_of_limit": round(floor / best, 4),
            }
        )
        print(results[-1], flush=True)
    print(json.dumps({"device": jax.devices()[0].device_kind, "decode": results}))


if __name__ == "__main__":
    main()
