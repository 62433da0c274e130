"""Inputs and float64 oracles of the op tests."""

from pathlib import Path

import numpy as np

from qwen3_moe_jax.convert.formats import FORMATS
from qwen3_moe_jax.convert.ggml_types import BLOCK_FORMATS, GGMLType
from qwen3_moe_jax.convert.open_model import open_model
from qwen3_moe_jax.convert.packed import PackedTensor
from qwen3_moe_jax.convert.unpack import dequantize, pack
from qwen3_moe_jax.testing import low_bits

SEED = 20260923


def rng_of(*what: object) -> np.random.Generator:
    """A generator seeded by the case; the seed is printed for a failure's report."""
    seed = SEED + sum(repr(what).encode())
    print(f"seed {seed} of {what}")
    return np.random.default_rng(seed)


def random_weights(rng: np.random.Generator, type: GGMLType, shape: tuple[int, ...]) -> PackedTensor:
    """Packed weights of random bytes, with scales that keep them near 1."""
    if type in (GGMLType.F32, GGMLType.F16, GGMLType.BF16):
        values = rng.standard_normal(shape, np.float32)
        if type is GGMLType.F32:
            return pack(values.reshape(-1).view(np.uint8), type, shape)
        bits = (
            values.astype(np.float16)
            if type is GGMLType.F16
            else (values.view(np.uint32) >> 16).astype(np.uint16)
        )
        return pack(bits.reshape(-1).view(np.uint8), type, shape)
    block = BLOCK_FORMATS[type]
    blocks = rng.integers(0, 256, (int(np.prod(shape)) // block.weights, block.nbytes), dtype=np.uint8)
    for name in low_bits.scale_names(type):
        low_bits.set_scale(blocks, type, name, rng.uniform(1e-3, 2e-3, len(blocks)))
    return pack(blocks.reshape(-1), type, shape)


def spoil_scale(file: Path, path: str, block: int) -> None:
    """Makes the scale of one block of a tensor infinite; a negative block counts from the last."""
    with open_model(file) as source:
        info = source._infos[path]
    layout = FORMATS[info.type].block
    block %= info.nbytes // layout.nbytes
    with open(file, "r+b") as opened:
        opened.seek(info.offset + block * layout.nbytes + layout.fields["d"].offset)
        opened.write(b"\x00\x7c")


def activations(rng: np.random.Generator, *shape: int, heavy_tailed: bool = False) -> np.ndarray:
    """Uniform in [-1, 1], or Student's t with 2.5 degrees of freedom and three channels 300 times larger."""
    if not heavy_tailed:
        return rng.uniform(-1, 1, shape).astype(np.float32)
    x = rng.standard_t(2.5, shape)
    x[..., rng.choice(shape[-1], 3, replace=False)] *= 300
    return x.astype(np.float32)


def nmse(found: np.ndarray, truth: np.ndarray) -> float:
    """Squared error over the square of the truth; NaN if anything is."""
    difference = found.astype(np.float64) - truth
    return float(np.sum(difference * difference) / np.sum(truth.astype(np.float64) ** 2))


def matmul64(x: np.ndarray, *weights: PackedTensor) -> np.ndarray:
    x = x.astype(np.float64)
    return np.concatenate([x @ dequantize(w, np.float64).T for w in weights], axis=-1)


def expert_matmul64(x: np.ndarray, ids: np.ndarray, weight: PackedTensor) -> np.ndarray:
    full = dequantize(weight, np.float64)
    inputs = np.broadcast_to(x[:, None], (*ids.shape, x.shape[-1])) if x.ndim == 2 else x
    return np.einsum("txk,txnk->txn", inputs.astype(np.float64), full[ids], optimize=False)


def swiglu64(gate: np.ndarray, up: np.ndarray) -> np.ndarray:
    return gate / (1 + np.exp(-gate)) * up
