"""A process with simulated devices: the decode kernel's step on a mesh of them, in Pallas' interpreter.

python tests/kernels/run_decode_on_mesh.py FILE MESH TOKEN ARRAYS.npz
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


def step(path: str, shape: MeshShape, token: int) -> dict[str, np.ndarray]:
    """The first token's logits as each device has them [devices, V], experts [L, X] and keys [L, K, H]."""
    with open_model(path) as source:
        config, shards = source.config, Shards.of(shape, source.config, jax.devices())
        params = load_sharded(source, shards, SimpleNamespace(platform="gpu"))
    split = Split(shape.ep, shape.tp)
    device = api.Device(blocks=1, splits=1, emulate=True, interpret=interpreter(), mesh=split)
    run = jax.jit(partial(on_all_devices, partial(api.decode_step, device=device), shards), static_argnums=1)
    cache = KVCache.create(config, 1, 64, jnp.float16, shards.of_cache, shards.cache_heads)
    ids, start = jnp.full(1, token, jnp.int32), jnp.zeros(1, jnp.int32)
    options = {"scales": cache.scales, "expert_ids": None, "active": None}
    logits, k, _, chosen, _ = run(params, config, ids, start, cache.k, cache.v, **options)
    whole = np.stack([np.asarray(part.data)[0] for part in logits.addressable_shards])
    return {"logits": whole, "experts": np.asarray(chosen)[:, 0], "keys": np.asarray(k)[:, 0, 0]}


def main() -> None:
    """Writes the arrays to a file."""
    path, text, token, arrays = sys.argv[1:]
    shape = MeshShape.parse(text)
    jax.config.update("jax_num_cpu_devices", shape.size)
    np.savez(arrays, **step(path, shape, int(token)))


if __name__ == "__main__":
    os.environ["NPROC"] = "32"  # every warpgroup of every device waits in a thread of its own
    jax.config.update("jax_platforms", "cpu")
    main()
