"""The kernels of prompts and of many sequences for a GPU that is not there (``scripts.compile_kernels``).

Products and attention, of either set; ``decode_layers`` is made of the same kernels, with few rows and with
one query per sequence.
"""

import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AbstractDevice, AbstractMesh, use_abstract_mesh

from qwen3_moe_jax.convert.config import PRESETS, Qwen3MoeConfig
from qwen3_moe_jax.convert.ggml_types import GGMLType
from qwen3_moe_jax.kernels_pallas.attention import kernel_sm80, kernel_sm90
from qwen3_moe_jax.kernels_pallas.gpu import cards, grouped_matmul_sm80, grouped_matmul_sm90
from qwen3_moe_jax.kernels_pallas.gpu.grouped_matmul_config import (
    MatmulConfig,
    experts_config,
    few_config,
    pick_config,
)
from qwen3_moe_jax.kernels_pallas.gpu.sorting import Tiles
from qwen3_moe_jax.kernels_pallas.packed.stacks import Matrices
from scripts import _absent_gpu
from scripts._captured import captured_output
from scripts._random_params import random_matrices


class Set(NamedTuple):
    """One set of kernels.

    Attributes:
      product, kernel: the grouped product, and its shapes for sizes and weights.
      attention: sizes of prompts and of one query per sequence.
      module: has the attention kernel.
    """

    product: Callable[..., jax.Array]
    kernel: Callable[[Matrices, bool, MatmulConfig], Any]
    attention: tuple[kernel_sm90.AttentionConfig, ...]
    module: Any


SETS = {
    "hopper": Set(
        grouped_matmul_sm90.grouped_matmul,
        lambda w, fused, config: grouped_matmul_sm90.Kernel(w, fused, config, 1, None),
        (kernel_sm90.AttentionConfig(), kernel_sm90.ONE_QUERY),
        kernel_sm90,
    ),
    "portable": Set(
        grouped_matmul_sm80.grouped_matmul,
        lambda w, fused, config: grouped_matmul_sm80.PortableKernel(
            w, fused, grouped_matmul_sm80.sizes(config, w), 1, None
        ),
        (kernel_sm80.SIZES, kernel_sm80.ONE_QUERY),
        kernel_sm80,
    ),
}
PRODUCTS = {
    "IQ4_XS swiglu": (GGMLType.IQ4_XS, True),
    "Q4_K swiglu": (GGMLType.Q4_K, True),
    "Q6_K": (GGMLType.Q6_K, False),
}
"""The type of the weights, and whether they are gate_proj and up_proj."""
TILES = {config.tile: config for config in (experts_config(), few_config(32), pick_config(128))}
"""Sizes by the rows that a tile holds: few rows of each expert, few rows of all, and many."""


def names(kernels: str) -> Iterator[tuple[str, int]]:
    """Name and rows of a tile of each kernel of a set."""
    for product in PRODUCTS:
        yield from ((f"grouped_matmul {kernels} {product}", tile) for tile in TILES)
    yield from ((f"attention {kernels}", config.tile) for config in SETS[kernels].attention)


def compiled(target: cards.Capability, row: dict) -> dict:
    """The row with its figures; its batch is the rows of a tile."""
    name, cores = _absent_gpu.first_card(target)
    named = AbstractDevice(device_kind=name, num_cores=cores, platform="gpu")
    mesh = AbstractMesh((), (), abstract_device=named)
    op, kernels, *product = row["kernel"].split(maxsplit=2)
    chosen, config = SETS[kernels], PRESETS[row["preset"]]
    if op == "attention":
        sizes = next(one for one in chosen.attention if one.tile == row["batch"])
        run, arguments, scratch = _attention(chosen, config, sizes)
    else:
        run, arguments, scratch = _product(chosen, config, TILES[row["batch"]], *PRODUCTS[product[0]])
    sharding = _absent_gpu.sharding_of(target)
    there = lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=sharding)
    with _absent_gpu.compiling_for(target), use_abstract_mesh(mesh), captured_output() as lines:
        jax.jit(run).trace(*jax.tree.map(there, arguments)).lower(lowering_platforms=("cuda",)).compile()
    memory = sum(_nbytes(buffer) for buffer in scratch if hasattr(buffer, "shape"))
    found = {"blocks": cores, **_absent_gpu.ptxas_report("\n".join(lines))}
    return row | found | {"shared_memory": memory, "limit": target.shared_memory}


Case = tuple[Callable[..., jax.Array], tuple[Any, ...], list[Any]]
"""A function, the shapes of its arguments, and its kernel's scratch memory."""


def _product(chosen: Set, c: Qwen3MoeConfig, config: MatmulConfig, kind: GGMLType, fused: bool) -> Case:
    rows, columns = c.moe_intermediate_size, c.hidden_size
    rows, columns = (rows, columns) if fused else (columns, rows)
    stack = jax.eval_shape(lambda: random_matrices(0, kind, c.num_experts * rows, columns))
    w = Matrices(stack, jax.ShapeDtypeStruct((), jnp.int32), (c.num_experts, rows, columns))
    numbers = lambda n: jax.ShapeDtypeStruct((n,), jnp.int32)
    arguments = (
        jax.ShapeDtypeStruct((4 * config.tile, columns), jnp.float16),
        jax.ShapeDtypeStruct((4 * config.tile,), jnp.float32),
        Tiles(*(numbers(256) for _ in range(3)), numbers(1)),
        *([w] * (2 if fused else 1)),
    )
    run = lambda x, scale, work, *weights: chosen.product(x, scale, work, weights, config=config)
    return run, arguments, list(chosen.kernel(w, fused, config).scratch().values())


def _attention(chosen: Set, c: Qwen3MoeConfig, config: kernel_sm90.AttentionConfig) -> Case:
    sequences, length = 4, 1024
    heads, rows = c.num_key_value_heads, 2 * config.tile
    shape, numbers = jax.ShapeDtypeStruct, lambda *axes: jax.ShapeDtypeStruct(axes, jnp.int32)
    cache = shape((1, sequences, length, heads, c.head_dim), jnp.float16)
    arguments = (
        shape((sequences * heads, rows, c.head_dim), jnp.float16),
        *(cache, cache, numbers(sequences, rows), numbers(sequences, 2, 2), numbers(1), numbers(sequences)),
    )
    run = lambda *arrays: kernel_sm90.attend_rows(*arrays, config, make=chosen.module.make_kernel)
    return run, arguments, list(chosen.module.scratch_of(config, c.head_dim, jnp.float16))


def _nbytes(buffer: Any) -> int:
    return -(-math.prod(buffer.shape) * np.dtype(buffer.dtype).itemsize // 1024) * 1024
