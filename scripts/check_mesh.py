"""Steps of the decode kernels on a mesh against one device's: logits, tokens, the same bits always.

    python -m scripts.make_random_gguf l4.gguf --preset Qwen3-30B-A3B --layers 4
    python -m scripts.check_mesh l4.gguf --mesh ep=2 --kernels hopper
    python -m scripts.check_mesh l4.gguf --mesh ep=2 --kernels hopper --sequences 64

Both write the same tokens, those that one device thinks best, from an empty cache, each twice. Up to 16
sequences are one kernel, 17 to 64 few launches per layer. The last line is JSON; the program fails where a
step is layer by layer, bits differ, or logits depart.
"""

import argparse
import json
import sys
import time
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from qwen3_moe_jax.convert.open_model import open_model
from qwen3_moe_jax.jax_backend.decode_path import LayerByLayer, choose
from qwen3_moe_jax.jax_backend.kv_cache import KVCache
from qwen3_moe_jax.jax_backend.runner import JaxRunner
from qwen3_moe_jax.jax_backend.sharding import MeshShape

MIN_COSINE = 0.9999
"""Of a position's logits: sums in another order, and int8 parts of activations that this moves by one."""
MAX_CHANGED = 0.01
"""Of a token's sets of experts, one for each layer: those that a sum in another order may change, at ties."""
LENGTH = 256


@dataclass(frozen=True)
class Run:
    """What a run gave, of ``T`` tokens of ``B`` sequences.

    Attributes:
      logits: float32 [T, B, V].
      tokens: int32 [T + 1, B], each the best after those before it.
      experts: int32 [T, B, L, X], in order.
      devices_agree: whether all devices had the same bits.
      seconds: of all steps but the first.
    """

    logits: np.ndarray
    tokens: np.ndarray
    experts: np.ndarray
    devices_agree: bool
    path: str
    seconds: float


def run(runner: JaxRunner, count: int, sequences: int, given: np.ndarray | None = None) -> Run:
    """Writes ``count`` tokens of each sequence; ``given`` are taken in place of the best."""
    model, shards = runner.decoder.model, runner.decoder.shards
    decoder = choose(model, runner.params, runner.device, jnp.float16)
    place = (shards.of_cache, shards.cache_heads) if shards else (runner.device, None)
    cache = KVCache.create(runner.config, sequences, LENGTH, jnp.float16, *place)
    path = decoder.path(runner.params, sequences, cache).name
    if path == LayerByLayer.name:
        sys.exit(f"a step is layer by layer: {decoder.describe()}")
    step: Any = jax.jit(partial(type(decoder).step, decoder), donate_argnums=3)
    tokens = [np.arange(1, 1 + sequences, dtype=np.int32)]
    found, chosen, agree, began = [], [], True, 0.0
    for position in range(count):
        if position == 1:
            began = time.perf_counter()
        ids = jnp.asarray((tokens if given is None else given)[position])[:, None]
        out = step(runner.params, ids, jnp.full(sequences, position, jnp.int32), cache)
        cache = out.cache
        parts = [np.asarray(part.data) for part in out.logits.addressable_shards]
        agree &= all(np.array_equal(parts[0], part) for part in parts)
        found.append(parts[0][:, 0])
        chosen.append(np.sort(np.asarray(out.expert_ids)[:, :, 0], axis=-1).swapaxes(0, 1))
        tokens.append(parts[0][:, 0].argmax(-1).astype(np.int32))
    seconds = time.perf_counter() - began
    return Run(np.stack(found), np.stack(tokens), np.stack(chosen), agree, path, seconds)


def cosines(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Of each position's logits."""
    a, b = a.astype(np.float64), b.astype(np.float64)
    return (a * b).sum(-1) / np.sqrt((a * a).sum(-1) * (b * b).sum(-1))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model")
    parser.add_argument("--mesh", required=True)
    parser.add_argument("--kernels", default="hopper")
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--sequences", type=int, default=1)
    args = parser.parse_args()
    runs = []
    for mesh in (None, MeshShape.parse(args.mesh)):
        with open_model(args.model) as source:
            options = {"kernels": args.kernels, "mesh": mesh, "others_follow": False}
            runner = JaxRunner(source, max_context=LENGTH, **options)
        for _ in range(2):
            runs.append(run(runner, args.tokens, args.sequences, runs[0].tokens if runs else None))
        runner.close()
        print(f"{mesh}: {runs[-1].seconds / (args.tokens - 1) * 1e3:.2f} ms per step, as calls", flush=True)
    one, _, mesh, again = runs
    cosine = cosines(one.logits, mesh.logits)
    changed = (one.experts != mesh.experts).any(-1)
    alike = ~np.logical_or.accumulate(changed.any(-1), axis=0)  # all of a sequence up to here
    found = {
        "device": jax.devices()[0].device_kind,
        "model": args.model,
        "mesh": args.mesh,
        "kernels": args.kernels,
        "path": mesh.path,
        "sequences": args.sequences,
        "tokens": args.tokens,
        "min_cosine": float(cosine[alike].min()),
        "min_cosine_where_experts_changed": float(cosine[~alike].min(initial=1)),
        "changed_choices": float(changed.mean()),
        "same_best": int((one.logits.argmax(-1) == mesh.logits.argmax(-1)).sum()),
        "same_bits_twice": bool(np.array_equal(mesh.logits, again.logits)),
        "same_bits_on_all_devices": mesh.devices_agree and again.devices_agree,
    }
    is_right = found["min_cosine"] > MIN_COSINE and found["changed_choices"] < MAX_CHANGED
    passed = is_right and found["same_bits_twice"] and found["same_bits_on_all_devices"]
    print(json.dumps({**found, "passed": passed}))
    sys.exit(not passed)


if __name__ == "__main__":
    main()
