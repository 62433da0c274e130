"""Speed of prompts on a GPU: the whole model of random weights, in the types of a published mixture.

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

from qwen3_moe_jax.convert.config import PRESETS
from qwen3_moe_jax.jax_backend.kv_cache import KVCache
from qwen3_moe_jax.jax_backend.qwen3_moe import Qwen3Moe
from qwen3_moe_jax.machine.kernels import AUTO, CHOICES, capability_of, choose_kernels
from qwen3_moe_jax.machine.limits import prefill_operations
from qwen3_moe_jax.measure.benchmark import random_prompts, repeated
from qwen3_moe_jax.testing.mixes import mix_types
from scripts._random_params import random_params


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
    parser.add_argument("--mix", default="Q4_K_M", help="the mixture whose types the tensors have")
    args = parser.parse_args()
    config = PRESETS[args.preset]
    types = mix_types(args.mix, config)
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
    print(
        json.dumps(
            {"device": jax.devices()[0].device_kind, "mix": args.mix, "kernels": kernels, "prefill": results}
        )
    )


if __name__ == "__main__":
    main()
