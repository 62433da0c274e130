"""A model's weights as the decode kernel reads them: stacks of tiles, and where each layer's matrices begin.

All of it is read off the parameters and their ``LayerTable``, without a copy, where the kernel is
called: nothing here is kept.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from qwen3_moe_jax.convert.ggml_types import GGMLType
from qwen3_moe_jax.convert.layouts.gpu_tiles import TILE_ROWS
from qwen3_moe_jax.convert.packed import GPU_TILES, PackedTensor
from qwen3_moe_jax.kernels_pallas.packed.stacks import LayerTable, LayerTensor

ROUTER = "mlp.router"
ROUTER_TYPES = tuple(t.name for t in (GGMLType.F32, GGMLType.F16, GGMLType.BF16))
TENSORS = {
    "o": "self_attn.o_proj",
    "gate": "mlp.experts.gate_proj",
    "up": "mlp.experts.up_proj",
    "down": "mlp.experts.down_proj",
}
"""The tensor of each role; queries, keys and values are the role "qkv"."""


class StepWeights(NamedTuple):
    """What the kernel takes.

    Attributes:
      stacks: packed [R, K] for each of "qkv", "o", "gate", "up", "down" and "lm_head", one for each type.
      table: int32 [L, columns], columns as :func:`column_names` names them; offsets are tiles of 8 rows.
      qkv_always: tiles of 8 rows of q, k and v that have the first type in every layer.
    """

    stacks: dict[str, tuple[PackedTensor, ...]]
    table: np.ndarray
    qkv_always: int

    @classmethod
    def of(cls, params: Mapping[str, Any]) -> "StepWeights":
        """From a model's parameters.

        Args:
          params: "layers" is the ``LayerTable``, "lm_head" packed [V, D]. Without it the logits are products
            with "embed_tokens".

        Raises:
          NotImplementedError: the kernel cannot read weights that lie so.
        """
        table: LayerTable = params["layers"]
        router = [stack.removeprefix(f"{ROUTER}.") for stack in table[ROUTER].stacks]
        if len(router) != 1 or router[0] not in ROUTER_TYPES:
            raise NotImplementedError(
                f"GPU decode step: the router is in {', '.join(router)}; it must be in one of "
                f"{', '.join(ROUTER_TYPES)}"
            )
        columns, always = _qkv_columns(table)
        stacks = {role: table[name].options for role, name in TENSORS.items()}
        stacks |= {"qkv": _qkv_stacks(table), "lm_head": (params.get("lm_head", params["embed_tokens"]),)}
        columns |= _type_and_offset("o", table[TENSORS["o"]])
        columns |= _type_and_offset("gate_up", _gate_up(table))
        columns |= _type_and_offset("down", table[TENSORS["down"]])
        names = column_names(len(stacks["qkv"]))
        return cls(stacks, table.columns([columns[name] for name in names]), always)

    @property
    def lm_head_tiled(self) -> bool:
        """Whether the matrix of the logits lies in tiles."""
        return self.stacks["lm_head"][0].layout == GPU_TILES

    @property
    def types(self) -> dict[str, tuple[GGMLType, ...]]:
        """The types of each role's stacks."""
        return {role: tuple(stack.type for stack in stacks) for role, stacks in self.stacks.items()}


def column_names(qkv_types: int) -> dict[str, int]:
    """Columns of the table for a model whose q, k and v come in ``qkv_types`` types."""
    names = []
    for i in range(qkv_types):
        names += [f"qkv_offset{i}", f"qkv_count{i}"]
    names += ["q_head", "k_head", "v_head", "o_type", "o_offset"]
    names += ["gate_up_type", "gate_up_offset", "down_type", "down_offset"]
    return {name: i for i, name in enumerate(names)}


def _type_and_offset(name: str, tensor: LayerTensor) -> dict[str, tuple[int, ...]]:
    return {
        f"{name}_type": tensor.which,
        f"{name}_offset": tuple(first // TILE_ROWS for first in tensor.first),
    }


def _gate_up(table: LayerTable) -> LayerTensor:
    gate, up = table[TENSORS["gate"]], table[TENSORS["up"]]
    types = [tuple(t.options[which].type for which in t.which) for t in (gate, up)]
    for layer, (one, other) in enumerate(zip(*types, strict=True)):
        if one != other:
            raise NotImplementedError(
                f"GPU decode step: gate_proj and up_proj of layer {layer} are {one.name} and {other.name}; "
                "they must have one type"
            )
    return gate


def _qkv(table: LayerTable) -> dict[str, LayerTensor]:
    tensors = {name: table[f"self_attn.{name}_proj"] for name in "qkv"}
    names = tuple(tensor.name for tensor in tensors.values())
    if any(tensor.neighbours != names for tensor in tensors.values()):
        raise NotImplementedError("GPU decode step: q, k and v must lie in the same stacks, layer by layer")
    return tensors


def _qkv_names(table: LayerTable) -> list[str]:
    """The stacks of q, k and v: that with most rows first, the lower type first among equals."""
    names = {stack for tensor in _qkv(table).values() for stack in tensor.stacks}
    return sorted(names, key=lambda name: (-table.stacks[name].shape[0], table.stacks[name].type))


def _qkv_stacks(table: LayerTable) -> tuple[PackedTensor, ...]:
    return tuple(table.stacks[name] for name in _qkv_names(table))


def _qkv_columns(table: LayerTable) -> tuple[dict[str, list[int]], int]:
    """The columns of q, k and v, whose rows of one type are one matrix; and ``StepWeights.qkv_always``."""
    tensors, stacks = _qkv(table), _qkv_names(table)
    head = table["self_attn.q_norm"].shape[0]
    columns: dict[str, list[int]] = {f"{name}_head": [] for name in tensors}
    for i in range(len(stacks)):
        columns |= {f"qkv_offset{i}": [], f"qkv_count{i}": []}
    used = [0] * len(stacks)
    for layer in range(table.num_layers):
        row = 0
        for i, stack in enumerate(stacks):
            here = {n: t for n, t in tensors.items() if t.place(layer)[0] == stack}
            tiles = sum(tensor.rows for tensor in here.values()) // TILE_ROWS
            columns[f"qkv_offset{i}"].append(used[i])
            columns[f"qkv_count{i}"].append(tiles)
            used[i] += tiles
            for name, tensor in here.items():
                columns[f"{name}_head"].append(row // head)
                row += tensor.rows
    return columns, min(columns["qkv_count0"])
