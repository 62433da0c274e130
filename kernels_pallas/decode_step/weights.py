"""The weights of a whole model as the decode kernel reads them: stacks of tiles and a table.

All matrices of one role and type form one stack of tiles, layer after layer, so that the
kernel indexes it without a copy; the table of int32 [layers, columns] says where each
layer's matrices begin. ``StepConfig.columns`` names the columns.
"""

from dataclasses import dataclass, field
from typing import Any

import jax
import numpy as np

from qwen3_moe_jax.convert.ggml_types import GGMLType

ROLES = ("qkv", "o", "gate", "up", "down", "lm_head")


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class DecodeWeights:
    """Arrays of the model for the decode kernel.

    Attributes:
      stacks: for each role, one dictionary of arrays a type (``convert.layouts.gpu_tiles``).
      table: int32 [L, columns].
      router: float32 [L, E, D].
      input_norm, post_norm: float32 [L, D]; q_norm, k_norm: float32 [L, H]; final_norm: float32 [D].
      embed_tokens: packed [V, D], layout ``rows``.
      types: for each role, the types of its stacks.
      qkv_always: 8-row tiles of q, k and v that have the first type in every layer.
    """

    stacks: dict[str, list[dict[str, Any]]]
    table: Any
    router: Any
    input_norm: Any
    post_norm: Any
    q_norm: Any
    k_norm: Any
    final_norm: Any
    embed_tokens: Any
    types: tuple[tuple[str, tuple[GGMLType, ...]], ...] = field(metadata={"static": True})
    qkv_always: int = field(metadata={"static": True})

    def types_of(self, role: str) -> tuple[GGMLType, ...]:
        return dict(self.types)[role]

    @property
    def nbytes(self) -> int:
        return sum(a.size * a.dtype.itemsize for a in jax.tree.leaves(self))


@dataclass(frozen=True)
class LayerTypes:
    """The quantization types of one layer's matrices."""

    q: GGMLType
    k: GGMLType
    v: GGMLType
    o: GGMLType
    gate_up: GGMLType
    down: GGMLType


@dataclass(frozen=True)
class StackPlan:
    """Where every matrix lies: the table, the types and the number of tiles of each stack."""

    table: np.ndarray
    columns: dict[str, int]
    types: dict[str, tuple[GGMLType, ...]]
    tiles: dict[str, tuple[int, ...]]
    qkv_order: tuple[tuple[str, ...], ...]
    qkv_always: int


def column_names(qkv_types: int) -> dict[str, int]:
    """Columns of the table for a model whose q, k and v come in ``qkv_types`` types."""
    names = []
    for i in range(qkv_types):
        names += [f"qkv_offset{i}", f"qkv_count{i}"]
    names += ["q_head", "k_head", "v_head", "o_type", "o_offset"]
    names += ["gate_up_type", "gate_up_offset", "down_type", "down_offset"]
    return {name: i for i, name in enumerate(names)}


def _by_frequency(types: list[GGMLType]) -> tuple[GGMLType, ...]:
    return tuple(sorted(set(types), key=lambda t: (-types.count(t), t)))


def plan_stacks(layers: list[LayerTypes], *, config: Any) -> StackPlan:
    """Lays the matrices of all layers out in stacks.

    Args:
      layers: the types of each layer.
      config: a model configuration with ``hidden_size`` and its fellows.
    """
    head = config.head_dim
    rows = {"q": config.num_attention_heads * head, "k": config.num_key_value_heads * head}
    rows["v"] = rows["k"]
    weighted = [getattr(layer, n) for layer in layers for n in "qkv" for _ in range(rows[n] // head)]
    qkv_types = _by_frequency(weighted)
    types = {
        "qkv": qkv_types,
        "o": _by_frequency([layer.o for layer in layers]),
        "gate": _by_frequency([layer.gate_up for layer in layers]),
        "down": _by_frequency([layer.down for layer in layers]),
    }
    columns = column_names(len(qkv_types))
    table = np.zeros((len(layers), len(columns)), np.int32)
    used = {role: [0] * len(types[role]) for role in types}
    order = []
    always = None
    each = {
        "o": config.hidden_size // 8,
        "gate": config.num_experts * config.moe_intermediate_size // 8,
        "down": config.num_experts * config.hidden_size // 8,
    }
    for i, layer in enumerate(layers):
        start, names = 0, []
        for t, type in enumerate(qkv_types):
            mine = [n for n in "qkv" if getattr(layer, n) is type]
            count = sum(rows[n] for n in mine) // 8
            table[i, columns[f"qkv_offset{t}"]] = used["qkv"][t]
            table[i, columns[f"qkv_count{t}"]] = count
            used["qkv"][t] += count
            for n in mine:
                table[i, columns[f"{n}_head"]] = start // head
                start += rows[n]
                names.append(n)
            if t == 0:
                always = count if always is None else min(always, count)
        order.append(tuple(names))
        for role, name, type in (
            ("o", "o", layer.o),
            ("gate", "gate_up", layer.gate_up),
            ("down", "down", layer.down),
        ):
            t = types[role].index(type)
            table[i, columns[f"{name}_type"]] = t
            table[i, columns[f"{name}_offset"]] = used[role][t]
            used[role][t] += each[role]
    types["up"], used["up"] = types["gate"], used["gate"]
    return StackPlan(table, columns, types, {r: tuple(n) for r, n in used.items()}, tuple(order), always or 0)
