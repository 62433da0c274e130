"""Decode speed of a GGUF file on an NVIDIA GPU: tokens a second, memory, cold start.

``python scripts/bench_decode.py model.gguf`` loads the file, arranges it for the decode
kernel and times generation on the device. The last line is JSON.
"""

import argparse
import json
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import jax
import jax.numpy as jnp
from profile_decode import speed

from convert.model_source import open_model
from kernels_pallas.decode_step import api


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", help="a .gguf file or a packed checkpoint")
    parser.add_argument("--speed", nargs="*", default=["1:0", "1:4096", "8:0"], help="batch:depth")
    args = parser.parse_args()
    start = time.perf_counter()
    with open_model(args.model) as source:
        config = source.config
        weights = api.prepare(config, source.types, source.tensor)
        jax.block_until_ready(weights)
    loaded = time.perf_counter() - start
    cache = api.empty_cache(config, 1, 128)
    step = jax.jit(lambda w, t, p, c: api.decode_step(w, config, t, p, c), donate_argnums=(3,))
    out = step(weights, jnp.array([1], jnp.int32), jnp.array([0], jnp.int32), cache)
    token = int(out.logits[0].argmax())
    first = time.perf_counter() - start
    result = {
        "device": jax.devices()[0].device_kind,
        "jax": jax.__version__,
        "model": args.model,
        "weights_bytes": weights.nbytes,
        "load_s": round(loaded, 1),
        "first_token_s": round(first, 1),
        "first_token": token,
        "speed": [speed(weights, config, *map(int, case.split(":"))) for case in args.speed],
    }
    stats = jax.devices()[0].memory_stats() or {}
    result["peak_bytes"] = stats.get("peak_bytes_in_use")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
