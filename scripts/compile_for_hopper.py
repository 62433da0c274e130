"""Compiles the model's prefill step for an H100 on a machine that has no GPU.

Needs the packages jax-cuda13-plugin and jax-cuda13-pjrt of JAX's version, and CUDA's ptxas. With
MOSAIC_GPU_DUMP_PTXAS=1 every kernel's registers and spills are printed.

    MOSAIC_GPU_DUMP_PTXAS=1 python scripts/compile_for_hopper.py --tokens 2048 --sequences 1
"""

import argparse
import os
import sys
import time
from pathlib import Path
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
sys.path.insert(0, str(Path(__file__).resolve().parent))
os.environ["JAX_PLATFORMS"] = "cpu"

import bench_prefill
import jax
import jax.numpy as jnp
from flax.core import FrozenDict
from jax.experimental import topologies
from jax.sharding import SingleDeviceSharding

from kernels_pallas.attention import pallas_sm90 as attention
from kernels_pallas.expert_matmul import pallas_sm90 as expert_matmul
from kernels_pallas.moe_mlp import pallas_sm90 as moe_mlp
from kernels_pallas.prefill import device
from kernels_pallas.quantized_matmul import pallas_sm90 as quantized_matmul
from qwen3_moe_jax.kv_cache import KVCache
from qwen3_moe_jax.model import Qwen3Moe

H100 = """
gpu_device_info {
  threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152
  shared_memory_per_core: 233472 threads_per_core_limit: 2048 core_count: 132 fpus_per_core: 128
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  memory_bandwidth: 3352320000000 l2_cache_size: 52428800 clock_rate_ghz: 1.98
  device_memory_size: 84942979072 shared_memory_per_block_optin: 232448
  cuda_compute_capability { major: 9 feature_extension: ACCELERATED_FEATURES }
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 10 }
runtime_version { major: 13 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""


def h100() -> SingleDeviceSharding:
    """An H100 that is not there."""
    jax.devices()  # makes the plugin known
    topology = topologies.get_topology_desc(
        platform="cuda", topology_name="h100", topology="1x1x1", target_config=H100
    )
    return SingleDeviceSharding(topology.devices[0])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--preset", default="Qwen3-30B-A3B", choices=sorted(bench_prefill.PRESETS))
    parser.add_argument("--tokens", type=int, default=2048, help="tokens of a chunk")
    parser.add_argument("--sequences", type=int, default=1)
    parser.add_argument("--length", type=int, default=4096, help="tokens that the cache holds")
    args = parser.parse_args()
    sharding = h100()
    config = bench_prefill.PRESETS[args.preset]
    types = bench_prefill.types_of(config)
    model = Qwen3Moe(config, jnp.bfloat16, types=FrozenDict(types))
    arguments = jax.eval_shape(
        lambda: (
            bench_prefill.random_params(config, types),
            KVCache.create(config, args.sequences, args.length, jnp.bfloat16),
            jnp.zeros((args.sequences, args.tokens), jnp.int32),
            jnp.zeros(args.sequences, jnp.int32),
        )
    )
    there = lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=sharding)
    began = time.perf_counter()
    modules = (attention, expert_matmul, moe_mlp, quantized_matmul, device)
    patches = [mock.patch.object(m, "require_hopper", return_value=None) for m in modules]
    for patch in patches:
        patch.start()
    traced = bench_prefill.chunk_step.trace(model, *jax.tree.map(there, arguments))
    compiled = traced.lower(lowering_platforms=("cuda",)).compile()
    for patch in patches:
        patch.stop()
    memory = compiled.memory_analysis()
    print(
        f"compiled in {time.perf_counter() - began:.0f} s; scratch {memory.temp_size_in_bytes / 1e9:.2f} GB, "
        f"arguments {memory.argument_size_in_bytes / 1e9:.2f} GB"
    )


if __name__ == "__main__":
    main()
