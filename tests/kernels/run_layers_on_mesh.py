"""A process with simulated devices: few launches per layer on a mesh of them, in Pallas' interpreter.

python tests/kernels/run_layers_on_mesh.py FILE MESH ARRAYS.npz TOKEN...
"""

import contextlib
import os
import sys
from functools import partial
from types import SimpleNamespace
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from jax._src.pallas.mosaic_gpu.interpret.shared_memory import GPUSharedMemory as SharedMemory

from qwen3_moe_jax.convert.open_model import open_model
from qwen3_moe_jax.jax_backend.decode_path import FewLaunches
from qwen3_moe_jax.jax_backend.kv_cache import KVCache
from qwen3_moe_jax.jax_backend.qwen3_moe import Qwen3Moe
from qwen3_moe_jax.jax_backend.sharded_params import load_sharded
from qwen3_moe_jax.jax_backend.sharding import MeshShape, Shards
from qwen3_moe_jax.kernels_pallas.decode_layers import api, kernel_sm90
from qwen3_moe_jax.kernels_pallas.gpu import grouped_matmul_config as matmul_config
from qwen3_moe_jax.kernels_pallas.gpu import grouped_matmul_sm90 as matmul_sm90
from qwen3_moe_jax.kernels_pallas.gpu.interpreter import interpreter


def step(path: str, shape: MeshShape, tokens: list[int]) -> dict[str, np.ndarray]:
    """The first token's logits as each device has them [devices, B, V], and experts [L, B, X].

    Also whether what stands between the products was in kernels.
    """
    with open_model(path) as source:
        config, shards = source.config, Shards.of(shape, source.config, jax.devices())
        params = load_sharded(source, shards, SimpleNamespace(platform="gpu"))
    model = Qwen3Moe(config, jnp.dtype(jnp.bfloat16), kernels="hopper", shards=shards)
    cache = KVCache.create(config, len(tokens), 128, jnp.float16, shards.of_cache, shards.cache_heads)
    ids, start = jnp.asarray(tokens, jnp.int32)[:, None], jnp.zeros(len(tokens), jnp.int32)
    run = partial(kernel_sm90.decode_layers, interpret=interpreter())
    with contextlib.ExitStack() as patches:
        for where, name, value in (
            (api, "require_hopper", lambda: None),
            (kernel_sm90, "decode_layers", run),
            (kernel_sm90, "_MIN_ROWS", 1),
            (matmul_sm90, "multiprocessors", lambda: 2),
            (matmul_config, "multiprocessors", lambda: 2),
            # asked when one device's kernel ends, of barriers of all devices
            (SharedMemory, "assert_no_barriers_allocated", lambda self: None),
        ):
            patches.enter_context(mock.patch.object(where, name, value))
        joined = patches.enter_context(
            mock.patch.object(kernel_sm90, "RowKernels", wraps=kernel_sm90.RowKernels)
        )
        run_step = jax.jit(partial(FewLaunches().step, model))
        out = jax.block_until_ready(run_step(params, ids, start, cache))
    whole = np.stack([np.asarray(part.data)[:, 0] for part in out.logits.addressable_shards])
    experts = np.asarray(out.expert_ids)[:, :, 0]
    return {"logits": whole, "experts": experts, "joined": np.asarray(joined.called)}


def main() -> None:
    """Writes the arrays to a file."""
    path, text, arrays, *tokens = sys.argv[1:]
    shape = MeshShape.parse(text)
    jax.config.update("jax_num_cpu_devices", shape.size)
    np.savez(arrays, **step(path, shape, [int(token) for token in tokens]))


if __name__ == "__main__":
    os.environ["NPROC"] = "32"  # every warpgroup of every device waits in a thread of its own
    jax.config.update("jax_platforms", "cpu")
    main()
