"""The portable grouped product, compiled for a GPU that is not there (``scripts.compile_kernels``)."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AbstractDevice, AbstractMesh, use_abstract_mesh

from qwen3_moe_jax.convert.config import PRESETS
from qwen3_moe_jax.convert.ggml_types import GGMLType
from qwen3_moe_jax.kernels_pallas.gpu import cards
from qwen3_moe_jax.kernels_pallas.gpu.grouped_matmul_config import MatmulConfig, few_config, pick_config
from qwen3_moe_jax.kernels_pallas.gpu.grouped_matmul_sm80 import PortableKernel, grouped_matmul, sizes
from qwen3_moe_jax.kernels_pallas.gpu.sorting import Tiles
from qwen3_moe_jax.kernels_pallas.packed.stacks import Matrices
from scripts import _absent_gpu
from scripts._captured import captured_output
from scripts.bench_prefill import random_tiles

CASES = {
    "grouped_matmul portable Q4_K swiglu": (GGMLType.Q4_K, True),
    "grouped_matmul portable Q6_K": (GGMLType.Q6_K, False),
}
"""Kernels by name: the type of the weights, and whether they are gate_proj and up_proj."""
TILES = {"few": few_config(32), "sorted": pick_config(128)}
"""Sizes by the rows that a tile holds."""


def compiled(target: cards.Capability, row: dict) -> dict:
    """The row with its figures; its batch is the rows of a tile."""
    kind, fused = CASES[row["kernel"]]
    config = next(c for c in TILES.values() if c.tile == row["batch"])
    weights = _weights(PRESETS[row["preset"]], kind, fused)
    kernel = PortableKernel(weights, fused, sizes(config, weights), 1, None)
    name, cores = _absent_gpu.first_card(target)
    named = AbstractDevice(device_kind=name, num_cores=cores, platform="gpu")
    mesh = AbstractMesh((), (), abstract_device=named)
    with _absent_gpu.compiling_for(target), use_abstract_mesh(mesh), captured_output() as lines:
        _compile(weights, fused, config, _absent_gpu.sharding_of(target))
    memory = sum(_nbytes(s) for key, s in kernel.scratch().items() if key != "barrier")
    found = {"blocks": cores, **_absent_gpu.ptxas_report("\n".join(lines))}
    return row | found | {"shared_memory": memory, "limit": target.shared_memory}


def _weights(config: Any, kind: GGMLType, fused: bool) -> Matrices:
    rows, columns = config.moe_intermediate_size, config.hidden_size
    rows, columns = (rows, columns) if fused else (columns, rows)
    stack = jax.eval_shape(lambda: random_tiles(0, kind, config.num_experts * rows, columns))
    return Matrices(stack, jax.ShapeDtypeStruct((), jnp.int32), (config.num_experts, rows, columns))


def _compile(weights: Matrices, fused: bool, config: MatmulConfig, sharding: Any) -> None:
    shape, columns = jax.ShapeDtypeStruct, weights.columns
    numbers = lambda n: shape((n,), jnp.int32)
    rows = 4 * config.tile
    arguments = (
        shape((rows, columns), jnp.float16),
        shape((rows,), jnp.float32),
        Tiles(*(numbers(256) for _ in range(3)), numbers(1)),
        *([weights] * (2 if fused else 1)),
    )
    run = lambda x, scale, work, *w: grouped_matmul(x, scale, work, w, config=config)
    there = lambda a: shape(a.shape, a.dtype, sharding=sharding)
    jax.jit(run).trace(*jax.tree.map(there, arguments)).lower(lowering_platforms=("cuda",)).compile()


def _nbytes(buffer: Any) -> int:
    return -(-math.prod(buffer.shape) * np.dtype(buffer.dtype).itemsize // 1024) * 1024
