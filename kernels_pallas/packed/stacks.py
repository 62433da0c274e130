"""Matrices inside stacks of packed rows that hold more than them, and the table of where each layer's lie.

``LayerTable`` is made once, when weights are loaded. The model's loop over layers, ``decode_layers`` and
``decode_step`` all read it: nothing else says where a layer's matrix is.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial, reduce
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from qwen3_moe_jax.convert.ggml_types import GGMLType
from qwen3_moe_jax.convert.layouts.gpu_tiles import TILE_ROWS
from qwen3_moe_jax.convert.packed import (
    ARRAY_FORMATS,
    GPU_TILES,
    LANES,
    LANES16,
    PackedTensor,
    array_shapes,
)
from qwen3_moe_jax.kernels_pallas.packed.pytree import to_device

_ROWS_PER_UNIT = {LANES16: LANES, GPU_TILES: TILE_ROWS}

Roles = Mapping[str, str]
"""Role of tensors that share stacks, by their name in a layer; others are their own role."""


def rows_per_unit(layout: str) -> int:
    """Rows that one index of the arrays' first axis stands for."""
    return _ROWS_PER_UNIT.get(layout, 1)


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
        return rows_per_unit(self.stack.layout)

    def slice(self, start: jax.Array | int, count: int) -> PackedTensor:
        """Rows ``start`` to ``start + count`` of the matrices, packed [count, K]; both whole units."""
        begin, size = (self.first + start) // self.unit, count // self.unit
        return jax.tree.map(lambda a: jax.lax.dynamic_slice_in_dim(a, begin, size), self.stack)

    def matrix(self, index: jax.Array) -> PackedTensor:
        """One of the matrices, packed [N, K]."""
        return self.slice(index * self.rows, self.rows)

    def one_per_row(self) -> tuple[PackedTensor, jax.Array]:
        """The stack as packed [R / N, N, K], and the offset in it of the first matrix."""
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


LayerView = dict[str, Any]
"""One layer's tensors under the parts of their names: :class:`OneOf`, or float32 [n] of a norm."""


@dataclass(frozen=True)
class LayerTensor:
    """One tensor of every layer, and where each layer's lies. Its numbers are not traced.

    Attributes:
      name: in its layer, "self_attn.q_proj".
      shape: of one layer's: [N, K], [E, N, K] of experts, or [n] of a norm.
      stacks: names of the stacks that hold it, one for each type that it has in some layer.
      first: int [L], each layer's first row in its stack.
      which: int [L], the index of that stack.
      neighbours: the tensors that share these stacks, in their order within a layer; itself included.
      options: packed [R, K] each, what ``stacks`` names; float32 [L, n] of a norm.
    """

    name: str
    shape: tuple[int, ...]
    stacks: tuple[str, ...]
    first: tuple[int, ...]
    which: tuple[int, ...]
    neighbours: tuple[str, ...]
    options: tuple[Any, ...] = ()

    @property
    def rows(self) -> int:
        """Rows of one layer's: N, or E * N of experts; one of a norm."""
        return math.prod(self.shape[:-1])

    def place(self, layer: int) -> tuple[str, int]:
        """The name of the stack that holds one layer's, and its first row there."""
        return self.stacks[self.which[layer]], self.first[layer]

    def layer(self, layer: jax.Array) -> "OneOf | jax.Array":
        """That of one layer, an int32 scalar on the device."""
        if len(self.shape) == 1:
            return self.options[0][layer]
        first, which = (jnp.asarray(of, jnp.int32)[layer] for of in (self.first, self.which))
        options = []
        for i, stack in enumerate(self.options):
            # where this is not the layer's type, any row will do: none is read
            last = max(f for f, w in zip(self.first, self.which, strict=True) if w == i)
            inside = first if len(self.options) == 1 else jnp.minimum(first, last)
            options.append(Matrices(stack, inside, self.shape))
        return OneOf(tuple(options), which)


@partial(jax.tree_util.register_dataclass, data_fields=["stacks"], meta_fields=["tensors"])
@dataclass(frozen=True)
class LayerTable:
    """All layers' tensors: stacks of rows, and where each layer's tensor lies in them.

    All matrices of one role and quantization type lie in one stack [R, K], layer after layer, and
    within a layer in their order there. A kernel finds a layer's matrix by its first row, nothing
    is copied, and the number of arrays does not grow with the number of layers. A role is a
    tensor's name in its layer, except where a platform's kernels read several tensors together.
    Norms are stacks [L, n] of their own.

    Attributes:
      stacks: packed [R, K] or float32 [L, n], by name ("self_attn.o_proj.Q4_K", "input_layernorm").
      tensors: static; in their order within a layer, without options.
    """

    stacks: dict[str, Any]
    tensors: tuple[LayerTensor, ...]

    @classmethod
    def plan(
        cls, tensors: Mapping[str, tuple[int, ...]], types: Sequence[Mapping[str, GGMLType]], roles: Roles
    ) -> "LayerTable":
        """Lays all layers' tensors out.

        A tensor's stacks are in the order of the rows that their types have in all layers, most first, the
        lower type first among equals: the type that most layers have is a kernel's first.

        Args:
          tensors: shapes in a layer, by name.
          types: of each layer, the type of each tensor; those of norms are not asked for.
          roles: names that several tensors share a stack under.

        Returns:
          The table, its stacks those of layout "rows" as ``jax.ShapeDtypeStruct``.
        """
        groups: dict[str, list[str]] = {}
        for name in tensors:
            groups.setdefault(roles.get(name, name), []).append(name)
        placed: dict[str, LayerTensor] = {}
        stacks: dict[str, Any] = {}
        for role, names in groups.items():
            shapes = {name: tensors[name] for name in names}
            lay = _lay_norms if len(shapes[names[0]]) == 1 else _lay_matrices
            more, its_stacks = lay(role, shapes, types)
            placed |= more
            stacks |= its_stacks
        return cls(stacks, tuple(placed[name] for name in tensors))

    def __getitem__(self, name: str) -> LayerTensor:
        """A tensor of all layers, with its stacks."""
        found = next((t for t in self.tensors if t.name == name), None)
        if found is None:
            raise KeyError(f"no tensor {name} in the layers")
        return replace(found, options=tuple(self.stacks[stack] for stack in found.stacks))

    def matrix_rows(self) -> dict[str, int]:
        """Of every stack of matrices: the largest number that divides the rows of each of them.

        A layout of several rows side by side must divide it, whatever the rows of the stack are: two
        routers of eight experts are sixteen rows, of which no sixteen are one matrix.
        """
        found: dict[str, int] = {}
        for tensor in self.tensors:
            if len(tensor.shape) > 1:
                found |= {stack: math.gcd(found.get(stack, 0), tensor.shape[-2]) for stack in tensor.stacks}
        return found

    @property
    def num_layers(self) -> int:
        """L."""
        return len(self.tensors[0].first)

    def layer(self, layer: jax.Array) -> LayerView:
        """One layer's tensors, as views of the stacks, under the parts of their names.

        Args:
          layer: int32 scalar; may be traced.
        """
        view: LayerView = {}
        for tensor in self.tensors:
            *parents, leaf = tensor.name.split(".")
            node = reduce(lambda node, key: node.setdefault(key, {}), parents, view)
            node[leaf] = self[tensor.name].layer(layer)
        return view

    def columns(self, order: Sequence[Sequence[int]]) -> np.ndarray:
        """Numbers of each layer as a kernel reads them: int32 [L, len(order)].

        Args:
          order: of each column its L numbers, such as a tensor's ``first`` or ``which``.
        """
        for column in order:
            if len(column) != self.num_layers:
                raise ValueError(
                    f"a column has {len(column)} numbers, and there are {self.num_layers} layers"
                )
        return np.stack([np.asarray(column, np.int32) for column in order], axis=1)


def _lay_norms(
    role: str, shapes: Mapping[str, tuple[int, ...]], types: Sequence[Mapping[str, GGMLType]]
) -> tuple[dict[str, LayerTensor], dict[str, Any]]:
    layers = len(types)
    [(name, shape)] = shapes.items()
    tensor = LayerTensor(name, shape, (role,), tuple(range(layers)), (0,) * layers, (name,))
    return {name: tensor}, {role: jax.ShapeDtypeStruct((layers, *shape), jnp.float32)}


def _lay_matrices(
    role: str, shapes: Mapping[str, tuple[int, ...]], types: Sequence[Mapping[str, GGMLType]]
) -> tuple[dict[str, LayerTensor], dict[str, Any]]:
    """Offsets of the matrices of one role, and its stacks."""
    rows = {name: math.prod(shape[:-1]) for name, shape in shapes.items()}
    used: dict[GGMLType, int] = {}
    first: dict[str, list[int]] = {name: [] for name in shapes}
    for its_types in types:
        for name in shapes:
            begin = used.get(its_types[name], 0)
            first[name].append(begin)
            used[its_types[name]] = begin + rows[name]
    ordered = sorted(used, key=lambda t: (-used[t], t))
    placed = {}
    for name, shape in shapes.items():
        own = [t for t in ordered if any(its_types[name] == t for its_types in types)]
        which = tuple(own.index(its_types[name]) for its_types in types)
        stacks = tuple(f"{role}.{t.name}" for t in own)
        placed[name] = LayerTensor(name, shape, stacks, tuple(first[name]), which, tuple(shapes))
    columns = next(iter(shapes.values()))[-1]
    return placed, {f"{role}.{t.name}": abstract_packed(t, (used[t], columns)) for t in ordered}


def abstract_packed(ggml_type: GGMLType, shape: tuple[int, ...]) -> PackedTensor:
    """A packed tensor in layout "rows" whose arrays are ``jax.ShapeDtypeStruct``."""
    formats = ARRAY_FORMATS[ggml_type]
    arrays = {n: jax.ShapeDtypeStruct(s, formats[n].dtype) for n, s in array_shapes(ggml_type, shape).items()}
    return PackedTensor(arrays, ggml_type)
