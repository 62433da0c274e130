"""Packed matrices as operands of a foreign call: their arrays, and the numbers that say where these are."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from qwen3_moe_jax.convert.ggml_types import GGMLType
from qwen3_moe_jax.convert.packed import LANES, LANES16, ROWS, PackedTensor
from qwen3_moe_jax.kernels_pallas.packed.stacks import Matrices, OneOf

ARRAYS = {
    GGMLType.Q4_K: ("q", "scales", "mins", "d", "dmin"),
    GGMLType.Q5_K: ("q", "scales", "mins", "d", "dmin", "qh"),
    GGMLType.Q6_K: ("ql", "qh", "scales", "d"),
    GGMLType.Q8_0: ("q", "d"),
    GGMLType.Q2_K: ("q", "scales", "d", "dmin"),
    GGMLType.Q3_K: ("q", "qh", "scales", "d"),
    GGMLType.IQ4_XS: ("q", "scales", "d"),
    GGMLType.IQ4_NL: ("q", "d"),
    GGMLType.Q4_0: ("q", "d"),
    GGMLType.Q4_1: ("q", "d", "m"),
    GGMLType.Q5_0: ("q", "qh", "d"),
    GGMLType.Q5_1: ("q", "qh", "d", "m"),
    GGMLType.MXFP4: ("q", "e"),
    GGMLType.F16: ("w",),
    GGMLType.BF16: ("w",),
    GGMLType.F32: ("w",),
}
"""Types that the C code multiplies by, and their arrays in its order (csrc/quants.h)."""

FLOATS = frozenset({GGMLType.F32, GGMLType.F16, GGMLType.BF16})


def check_matrices(w: Matrices | OneOf) -> None:
    """Raises NotImplementedError where the C code does not multiply by one of these types and layouts."""
    for option in options_of(w):
        check_stack(option.stack, option.rows)


def check_stack(stack: PackedTensor, rows: int) -> None:
    """As :func:`check_matrices`, for matrices of ``rows`` rows in this stack."""
    layout = ROWS if stack.type in FLOATS else LANES16
    if stack.type not in ARRAYS:
        raise NotImplementedError(f"it has no products of {stack.type.name}")
    if stack.layout != layout:
        raise NotImplementedError(f"{stack.type.name} in layout {stack.layout!r}, not {layout!r}")
    if layout == LANES16 and rows % LANES:
        raise NotImplementedError(f"{rows} rows are not a multiple of {LANES}")


def options_of(w: Matrices | OneOf) -> tuple[Matrices, ...]:
    """The matrices of every type that ``w`` may have."""
    return w.options if isinstance(w, OneOf) else (w,)


class Operands:
    """Collects the arrays of a call after ``first`` others, and the numbers that describe them."""

    def __init__(self, first: int):
        self._first = first
        self.arrays: list[Any] = []

    def stack(self, stack: PackedTensor) -> list[int]:
        """Adds a stack: its type, the index of its first array, and their number."""
        names = ARRAYS[stack.type]
        index = self._first + len(self.arrays)
        self.arrays += [stack.arrays[name] for name in names]
        return [int(stack.type), index, len(names)]

    def choice(self, w: Matrices | OneOf) -> list[int]:
        """Adds every option: their number, then each as :meth:`stack`."""
        options = options_of(w)
        return [len(options), *(number for option in options for number in self.stack(option.stack))]


def offset_of(w: Matrices | OneOf) -> jax.Array:
    """int32 [2]: which option is meant, and its first row."""
    if isinstance(w, Matrices):
        return jnp.stack([jnp.int32(0), w.first.astype(jnp.int32)])
    first = jnp.stack([option.first for option in w.options])[w.which]
    return jnp.stack([w.which.astype(jnp.int32), first.astype(jnp.int32)])


def numbers(values: Sequence[int]) -> np.ndarray:
    """The first argument of every handler."""
    return np.asarray(values, np.int32)
