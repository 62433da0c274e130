"""The supported types and what computes with them where, from the code's own tables."""

import textwrap
from collections.abc import Collection, Iterable

from qwen3_moe_jax.convert.ggml_types import BLOCK_FORMATS, GGMLType
from qwen3_moe_jax.convert.layouts.gpu_tiles import TILED_TYPES
from qwen3_moe_jax.kernels_pallas.native.operands import ARRAYS as NATIVE_TYPES
from scripts._receipts import table

WIDTH = 120
"""Characters of a line of prose."""


def types() -> str:
    """A row for each type: bits, and what multiplies by it on each backend."""
    decode = decode_types()
    rows = []
    for kind, form in BLOCK_FORMATS.items():
        cpu = "native kernels" if kind in NATIVE_TYPES else "XLA"
        rows.append(
            (kind.name, f"{8 * form.nbytes / form.weights:g}", cpu, _on_gpu(kind, decode), "WGSL", "NumPy")
        )
    return table("type | bits per weight | jax, CPU | jax, NVIDIA GPU | wgpu | reference", rows)


def _on_gpu(kind: GGMLType, decode: Collection[GGMLType]) -> str:
    if kind in TILED_TYPES:
        return "all kernels"
    return "decode kernel; prompts by XLA" if kind in decode else "XLA"


def types_in_words() -> str:
    """The same as one paragraph."""
    decode = decode_types()
    only_decode = [kind for kind in decode if kind not in TILED_TYPES]
    rest = [kind for kind in BLOCK_FORMATS if kind not in decode]
    text = (
        f"Types, on every backend: {_names(TILED_TYPES)}, on NVIDIA GPUs in every kernel; "
        f"{_names(only_decode)}, in the decode kernel there, prompts by XLA; "
        f"{_names(rest)} matrices, by XLA there."
    )
    return textwrap.fill(text, WIDTH) + "\n"


def decode_types() -> Collection[GGMLType]:
    """Those that the GPU's decode kernel multiplies by."""
    from qwen3_moe_jax.kernels_pallas.decode_step.row_formats import ROW_FORMATS  # needs JAX 0.11

    return ROW_FORMATS


def _names(kinds: Iterable[GGMLType]) -> str:
    return ", ".join(sorted((kind.name for kind in kinds), key=_order))


def _order(name: str) -> int:
    return [kind.name for kind in BLOCK_FORMATS].index(name)
