"""Where every tensor of the layers lies: stacks of rows, one for each role and type.

All matrices of one role and quantization type lie in one stack [R, K], layer
after layer. A kernel finds a layer's matrix by its first row, nothing is
copied, and the number of arrays does not grow with the number of layers.

A role is a tensor's name in its layer ("self_attn.q_proj"), except where a
platform's kernels read several tensors together. Norm weights are stacks
[L, size] of their own.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from qwen3_moe_jax.convert.config import Qwen3MoeConfig
from qwen3_moe_jax.convert.ggml_types import GGMLType
from qwen3_moe_jax.convert.tensor_names import TensorSpec, tensor_specs

Types = Mapping[str, GGMLType]
"""Quantization type of each parameter, by its path ("layers.3.mlp.router")."""

Roles = Mapping[str, str]
"""Role of tensors that share a stack, by their name in a layer; others are their own role."""


@dataclass(frozen=True)
class Place:
    """Where a layer's tensor lies.

    Attributes:
      stack: the stack's name.
      first: its first row; the layer for norm weights.
      rows: how many; a stack of E experts has E * N rows.
    """

    stack: str
    first: int
    rows: int


@dataclass(frozen=True)
class StackShape:
    """A whole stack: ``rows`` x ``columns`` weights of ``type``, or float32 vectors where type is None."""

    rows: int
    columns: int
    type: GGMLType | None


def split_path(path: str) -> tuple[int | None, str]:
    """("layers.3.mlp.router") -> (3, "mlp.router"); the layer is None outside the layers."""
    if not path.startswith("layers."):
        return None, path
    _, layer, name = path.split(".", 2)
    return int(layer), name


def stack_layers(
    config: Qwen3MoeConfig, types: Types, roles: Roles
) -> tuple[dict[str, Place], dict[str, StackShape]]:
    """Places of all tensors of the layers, by path, and the stacks' shapes, by name.

    Within a stack, layers follow each other, and within a layer tensors in the
    order of ``tensor_specs``.
    """
    places: dict[str, Place] = {}
    shapes: dict[str, StackShape] = {}
    for spec in tensor_specs(config):
        layer, name = split_path(spec.path)
        if layer is None:
            continue
        place, shape = _next_place(spec, name, types[spec.path], roles, shapes)
        places[spec.path], shapes[place.stack] = place, shape
    return places, shapes


def _next_place(
    spec: TensorSpec, name: str, ggml_type: GGMLType, roles: Roles, shapes: Mapping[str, StackShape]
) -> tuple[Place, StackShape]:
    if len(spec.shape) == 1:
        stack, rows, columns, stored = name, 1, spec.shape[0], None
    else:
        *leading, columns = spec.shape
        stack, stored = f"{roles.get(name, name)}.{ggml_type.name}", ggml_type
        rows = leading[0] * (leading[1] if len(leading) == 2 else 1)
    first = shapes[stack].rows if stack in shapes else 0
    return Place(stack, first, rows), StackShape(first + rows, columns, stored)
