"""Random inputs for the cases of ops: shapes, packed weights, activations, routing; seeds from names."""

import itertools
import zlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qwen3_moe_jax.convert.ggml_types import BLOCK_FORMATS, GGMLType
from qwen3_moe_jax.convert.layouts.gpu_tiles import to_gpu_tiles
from qwen3_moe_jax.convert.packed import PackedTensor
from qwen3_moe_jax.convert.unpack import dequantize, pack
from qwen3_moe_jax.kernels_pallas.expert_matmul.routing import ROW_TILE
from qwen3_moe_jax.kernels_pallas.gpu.device import require_hopper
from qwen3_moe_jax.testing import low_bits

QUANTIZED = (GGMLType.Q4_K, GGMLType.Q5_K, GGMLType.Q6_K, GGMLType.Q8_0)
PLAIN = (GGMLType.F32, GGMLType.F16, GGMLType.BF16)
DTYPES = (jnp.float32, jnp.bfloat16)

# (rows N, tokens T, columns K)
MATMUL_SHAPES = (
    *((16, t, 256) for t in range(1, 10)),
    *((16, t, 4096) for t in (1, 8)),
    *((4096, t, 1024) for t in range(1, 9)),
    *((1023, t, 4096) for t in range(1, 9)),
    *((n, 2, 1024) for n in (6271, 6272, 6273)),
    (1, 64, 256),
)

# (experts E, used X, one x row for all experts of a token, tokens T, rows N, columns K)
EXPERT_SHAPES = (
    *(
        (e, x, shared, t, 512, 256)
        for e, x, shared, t in itertools.product((4, 8), (1, 2, 4), (False, True), (1, 4, 5, 17, 32, 129))
    ),
    *((4, 4, True, t, 512, 256) for t in (1, 15, 16, 17, 31, 32, 33, 47, 48, 49)),
    (8, 1, True, 1, 512, 256),
    (4, 2, True, 16, 64, 768),
    *((128, 4, True, t, 64, 2048) for t in (16, 32, 64)),
)


def hopper_marks() -> tuple:
    """Of what needs a Hopper GPU, and is skipped without one."""
    reason = ""
    try:
        require_hopper()
    except NotImplementedError as error:
        reason = str(error)
    return pytest.mark.skipif(bool(reason), reason=reason or "runs here"), pytest.mark.gpu


def needs_hopper_gpu(test):
    """Marks a test or a class of them as one for Hopper GPUs, which alone is skipped without one."""
    for mark in hopper_marks():
        test = mark(test)
    return test


@pytest.fixture
def rng(request) -> np.random.Generator:
    """Random numbers of this test: the seed is the test's name, without its class."""
    name = request.node.name
    print(f"seed {seed_of(name)} of {name}")
    return np.random.default_rng(seed_of(name))


def seed_of(name: str) -> int:
    """The seed of the test of this name."""
    return zlib.crc32(name.encode())


def random_weights(rng: np.random.Generator, type: GGMLType, shape: tuple[int, ...]) -> PackedTensor:
    """Random bytes with scales of both signs and a few per mille in size; NumPy, layout "rows"."""
    block = BLOCK_FORMATS[type]
    count = int(np.prod(shape)) // block.weights
    if type in PLAIN:
        values = rng.standard_normal(count).astype("<f4")
        raw = values.view("<u4") >> 16 if type is GGMLType.BF16 else values
        raw = raw.astype({GGMLType.F32: "<f4", GGMLType.F16: "<f2", GGMLType.BF16: "<u2"}[type])
        return pack(raw.view(np.uint8), type, shape)
    blocks = rng.integers(0, 256, (count, block.nbytes), dtype=np.uint8)
    for name in low_bits.scale_names(type):
        scale = rng.uniform(1e-3, 4e-3, count) * rng.choice((-1, 1), count)
        low_bits.set_scale(blocks, type, name, scale)
    return pack(blocks.reshape(-1), type, shape)


def poison(w: PackedTensor, keep: np.ndarray) -> PackedTensor:
    """The same stack with NaN in every expert but those of ``keep``."""
    name = next(name for name in ("d", "w", "e") if name in w.arrays)
    poisoned = w.arrays[name].copy()
    poisoned[np.setdiff1d(np.arange(w.shape[0]), keep)] = 255 if name == "e" else np.nan
    return PackedTensor({**w.arrays, name: poisoned}, w.type, w.layout)


def scatter_experts(some: PackedTensor, ids: np.ndarray, experts: int) -> PackedTensor:
    """A stack of ``experts`` with ``some`` at ``ids`` and NaN everywhere else."""
    arrays = {}
    for name, array in some.arrays.items():
        arrays[name] = np.full(
            (experts, *array.shape[1:]), np.nan if array.dtype.kind == "f" else 1, array.dtype
        )
        arrays[name][ids] = array
    return PackedTensor(arrays, some.type, some.layout)


def dense64(w: PackedTensor) -> np.ndarray:
    return dequantize(w).astype(np.float64)


def heavy_tailed(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    """Like activations: Student's t with 2.5 degrees of freedom, three channels 300 times as large."""
    x = rng.standard_t(2.5, shape)
    x[..., rng.choice(shape[-1], 3, replace=False)] *= 300
    return x.astype(np.float32)


def uniform(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    return rng.uniform(-1, 1, shape).astype(np.float32)


def routing_patterns(rng: np.random.Generator) -> dict[str, tuple[int, np.ndarray]]:
    """Patterns by name: (E, expert of each row), enough rows for the sorted form."""
    per_expert = [1, ROW_TILE - 1, ROW_TILE, ROW_TILE + 1]
    edges = np.repeat(np.arange(4), per_expert)
    return {
        "uniform": (8, rng.integers(0, 8, 200)),
        "one expert takes all": (8, np.full(200, 5)),
        "tile edges": (4, rng.permutation(edges)),
        "tile edges, reversed": (4, rng.permutation(3 - edges)),
        "E no power of two": (5, rng.integers(0, 5, 97)),
        "last expert empty": (3, rng.integers(0, 2, 100)),
        "last expert alone": (6, np.full(41, 5)),
        "Zipf": (16, rng.zipf(1.3, 200) % 16),
    }


def tiled(w: PackedTensor) -> PackedTensor:
    """The matrix in the tiles that GPU kernels read, on the device."""
    return jax.tree_util.tree_map(jnp.asarray, to_gpu_tiles(w))
