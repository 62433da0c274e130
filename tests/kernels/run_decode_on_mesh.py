"""A process with simulated devices: logits of the decode kernel's steps on meshes of them.

python tests/kernels/run_decode_on_mesh.py FILE ARRAYS.npz
"""

import os
import sys
from functools import partial
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np

from qwen3_moe_jax.convert.open_model import open_model
from qwen3_moe_jax.jax_backend.kv_cache import KVCache
from qwen3_moe_jax.jax_backend.sharded_network import on_all_devices
from qwen3_moe_jax.jax_backend.sharded_params import load_sharded
from qwen3_moe_jax.jax_backend.sharding import MeshShape, Shards
from qwen3_moe_jax.kernels_pallas.decode_step import api
from qwen3_moe_jax.kernels_pallas.decode_step.exchange import Split
from qwen3_moe_jax.kernels_pallas.gpu.interpreter import interpreter

TOKENS = [[3, 41, 7], [250, 41, 19]]
"""Of two sequences, one step after the other."""
SHAPES = ("tp=1,ep=2", "tp=2,ep=2")


def steps(path: str, text: str, sequences: int) -> dict[str, np.ndarray]:
    """Logits [steps, B, V] and experts [steps, L, B, X]; logits as each device has them."""
    with open_model(path) as source:
        shards = Shards.of(MeshShape.parse(text), source.config, jax.devices())
        params = load_sharded(source, shards, SimpleNamespace(platform="gpu"))
        config = source.config
    split = Split(shards.shape.ep, shards.shape.tp)
    device = api.Device(blocks=1, splits=1, emulate=True, interpret=interpreter(), mesh=split)
    step = jax.jit(partial(on_all_devices, partial(api.decode_step, device=device), shards), static_argnums=1)
    cache = KVCache.create(config, sequences, 64, jnp.float16, shards.of_cache, shards.cache_heads)
    k, v, logits, experts = cache.k, cache.v, [], []
    for position, ids in enumerate(zip(*TOKENS[:sequences], strict=True)):
        start = jnp.full(sequences, position, jnp.int32)
        found, k, v, chosen = step(
            params, config, jnp.asarray(ids, jnp.int32), start, k, v, expert_ids=None, active=None
        )
        logits.append([np.asarray(part.data) for part in found.addressable_shards])
        experts.append(np.asarray(chosen))
    return {"logits": np.asarray(logits), "experts": np.asarray(experts)}


def main() -> None:
    """Writes the arrays of all meshes to a file."""
    path, arrays = sys.argv[1:]
    found = {}
    for text in SHAPES:
        for sequences in (1, 2) if text == SHAPES[0] else (1,):
            its = steps(path, text, sequences)
            found |= {f"{text} {sequences} {name}": value for name, value in its.items()}
    np.savez(arrays, **found)


if __name__ == "__main__":
    os.environ["NPROC"] = "32"
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", 4)
    main()
