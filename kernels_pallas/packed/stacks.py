"""A matrix, or one layer's experts, inside a stack of packed rows that holds more than it."""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from qwen3_moe_jax.convert.layouts.gpu_tiles import TILE_ROWS
from qwen3_moe_jax.convert.packed import GPU_TILES, LANES, LANES16, PackedTensor
from qwen3_moe_jax.kernels_pallas.packed.pytree import to_device

_ROWS_A_UNIT = {LANES16: LANES, GPU_TILES: TILE_ROWS}


def rows_a_unit(layout: str) -> int:
    """Rows that one index of the arrays' first axis stands for."""
    return _ROWS_A_UNIT.get(layout, 1)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Matrices:
    """Packed matrices that lie one after the other in a longer stack; ops read nothing else of it.

    Attributes:
      stack: packed [R, K].
      first: int32 scalar, the first row. A multiple of what the layout keeps together, and in
        layout "lanes16" of N.
      shape: logical shape: [N, K], or [E, N, K] for the experts of a layer.
    """

    stack: PackedTensor
    first: jax.Array
    shape: tuple[int, ...] = field(metadata={"static": True})

    @classmethod
    def of(cls, w: "PackedTensor | Matrices") -> "Matrices":
        """``w`` itself, or a whole packed tensor as its own stack."""
        if isinstance(w, Matrices):
            return w
        stack = w
        if w.ndim == 3:
            stack = jax.tree.map(lambda a: a.reshape(-1, *a.shape[2:]), w)
        return cls(to_device(stack), jnp.int32(0), w.shape)

    @property
    def ndim(self) -> int:
        return len(self.shape)

    @property
    def rows(self) -> int:
        """N, the rows of one matrix."""
        return self.shape[-2]

    @property
    def columns(self) -> int:
        """K."""
        return self.shape[-1]

    @property
    def unit(self) -> int:
        """Rows that one index of the stack's first axis stands for."""
        return rows_a_unit(self.stack.layout)

    def slice(self, start: jax.Array | int, count: int) -> PackedTensor:
        """Rows ``start`` to ``start + count`` of the matrices, packed [count, K]; both whole units."""
        begin, size = (self.first + start) // self.unit, count // self.unit
        return jax.tree.map(lambda a: jax.lax.dynamic_slice_in_dim(a, begin, size), self.stack)

    def matrix(self, index: jax.Array) -> PackedTensor:
        """One of the matrices, packed [N, K]."""
        return self.slice(index * self.rows, self.rows)

    def one_a_row(self) -> tuple[PackedTensor, jax.Array]:
        """The stack as packed [R / N, N, K], and the place in it of the first matrix."""
        units = self.rows // self.unit
        return (
            jax.tree.map(lambda a: a.reshape(-1, units, *a.shape[1:]), self.stack),
            self.first // self.rows,
        )


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class OneOf:
    """Matrices of one of several types; which one is known on the device alone.

    Ops take it in place of ``Matrices``. A kernel that can be told to do nothing runs once for each
    type, which spares the GPU a wait for the host; everything else branches (:func:`switch_types`).

    Attributes:
      options: matrices of one shape in different types.
      which: int32 scalar, the index of the option that is meant.
    """

    options: tuple[Matrices, ...]
    which: jax.Array

    @property
    def shape(self) -> tuple[int, ...]:
        return self.options[0].shape

    @property
    def ndim(self) -> int:
        return len(self.shape)


def as_matrices(w: PackedTensor | Matrices | OneOf) -> Matrices | OneOf:
    """``Matrices.of``, which leaves a choice of types as it is; a choice of one is none."""
    if isinstance(w, OneOf):
        return w.options[0] if len(w.options) == 1 else w
    return Matrices.of(w)


def switch_types(f: Callable[..., Any], *args: Any) -> Any:
    """``f(*args)`` with a branch for each type of every argument that is a :class:`OneOf`."""
    for i, arg in enumerate(args):
        if isinstance(arg, OneOf):
            branches = [partial(switch_types, f, *args[:i], m, *args[i + 1 :]) for m in arg.options]
            return jax.lax.switch(arg.which, branches)
    return f(*args)
