"""QUANT-001 of a file: two readings of the same blocks."""

from collections.abc import Collection

import numpy as np

from qwen3_moe_jax.convert.fused import with_parts
from qwen3_moe_jax.convert.ggml_types import BLOCK_FORMATS
from qwen3_moe_jax.convert.gguf_file import GGUFFile
from qwen3_moe_jax.convert.source import ModelSource
from qwen3_moe_jax.convert.unpack import dequantize
from qwen3_moe_jax.parity.second_reading import read_blocks
from qwen3_moe_jax.parity.text_runs import differing_bits

ROWS_READ = 32
"""Of each tensor, spread over all of it."""


def rows_that_differ(source: ModelSource, paths: Collection[str]) -> tuple[int, int]:
    """Weights of these tensors that differ in any bit between the two readings, and of how many."""
    different = count = 0
    with GGUFFile.open(source.path) as file:
        infos = with_parts(file.tensors, source.config)
        for path in paths:
            spec = source.specs[path]
            info, packed = infos[spec.gguf_name], source.tensor(path)
            block = BLOCK_FORMATS[info.type]
            columns = spec.shape[-1]
            flat = {k: a.reshape(-1, a.shape[-1]) for k, a in packed.arrays.items()}
            rows = int(np.prod(spec.shape[:-1]))
            raw = np.empty(block.row_nbytes(columns), np.uint8)
            for row in np.unique(np.linspace(0, rows - 1, ROWS_READ).astype(int)):
                file.read_into(info, int(row) * raw.nbytes, raw)
                one = type(packed)({k: a[row : row + 1] for k, a in flat.items()}, packed.type)
                expected = read_blocks(raw, info.type).reshape(-1)
                different += differing_bits(dequantize(one).reshape(-1), expected)
                count += columns
    return different, count
