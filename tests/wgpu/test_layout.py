"""The words on the device, written and cut into windows, on the CPU."""

import numpy as np
import pytest

from qwen3_moe_jax.convert.ggml_types import BLOCK_FORMATS, SUPPORTED_TYPES, GGMLType
from qwen3_moe_jax.convert.unpack import pack
from qwen3_moe_jax.wgpu_backend.layout import (
    WORD_FORMATS,
    device_nbytes,
    device_words,
    granule,
    items_per_window,
)
from tests.wgpu.cases import random_weights, rng_of

TYPES = pytest.mark.parametrize("type", SUPPORTED_TYPES, ids=lambda t: t.name)


_SPREAD = (GGMLType.Q3_K, GGMLType.IQ4_XS, GGMLType.IQ1_M)
"""Types whose scales take more on the device than in a file, as in packed arrays."""


@pytest.mark.parametrize("type", [GGMLType.Q4_K, GGMLType.Q5_K], ids=lambda t: t.name)
def test_k_quants_of_one_scale_are_the_bytes_of_the_file(type):
    block = BLOCK_FORMATS[type]
    raw = rng_of(type).integers(0, 256, 6 * block.nbytes, dtype=np.uint8)
    np.testing.assert_array_equal(device_words(pack(raw, type, (3, 512))), raw)


@TYPES
def test_nothing_is_padded(type):
    weights = random_weights(rng_of(type), type, (16, 512))
    words = device_words(weights)
    assert len(words) == device_nbytes(type, 16 * 512)
    assert len(words) == weights.nbytes if type in _SPREAD else 16 * BLOCK_FORMATS[type].row_nbytes(512)


@TYPES
def test_rows_in_pieces_are_the_rows_at_once(type):
    """Cut at the granule, the words of the parts follow each other."""
    columns = 256 if WORD_FORMATS[type].block == 256 else 96  # three blocks of 32
    weights = random_weights(rng_of(type), type, (24, columns))
    stride = granule(type, columns)
    parts = [device_words(weights[i : i + stride]) for i in range(0, 24, stride)]
    np.testing.assert_array_equal(np.concatenate(parts), device_words(weights))


def test_windows():
    assert items_per_window(GGMLType.Q4_K, 100, 256, 144 * 100, 1000) == 100
    assert items_per_window(GGMLType.Q4_K, 100, 256, 144 * 99, 1000) == 99
    assert items_per_window(GGMLType.Q6_K, 100, 256, 210 * 99, 1000) == 96  # groups of eight superblocks
    assert items_per_window(GGMLType.Q6_K, 100, 2048, 1680 * 99, 1000) == 99
    assert items_per_window(GGMLType.F32, 100, 4, 1600, 30) == 30
    with pytest.raises(ValueError, match="binds at once"):
        items_per_window(GGMLType.Q6_K, 100, 256, 210 * 7, 1000)
