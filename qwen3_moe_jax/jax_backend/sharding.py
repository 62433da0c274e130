"""Which part of each weight lies on which device, and how the network runs on all of them.

A mesh has two axes. ``ep`` splits the experts by expert, ``tp`` splits each expert's own width.
Attention heads, the KV cache and the head's vocabulary are split over both. Everything else is
whole on every device. ``LOGICAL_AXES`` and ``MESH_AXES`` are the table; nothing else says what is cut.

Every device holds packed stacks and one ``LayerTable`` of its own part, which is the same for all
of them, so that the network runs inside ``jax.shard_map`` as it does on one device: it adds up the
partial sums of ``o_proj`` and of the experts, twice per layer. Quantized blocks are never cut: a part
is whole rows, and of columns whole blocks.

Source of the scheme: Megatron-LM (arXiv 1909.08053) for columns and rows, GShard
(arXiv 2006.16668) for experts.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from qwen3_moe_jax.convert.config import Qwen3MoeConfig
from qwen3_moe_jax.convert.ggml_types import BLOCK_FORMATS, GGMLType
from qwen3_moe_jax.convert.packed import LANES, Box
from qwen3_moe_jax.convert.tensor_names import TensorSpec, tensor_specs
from qwen3_moe_jax.core.errors import OptionError
from qwen3_moe_jax.core.mesh import AUTO_MESH, mesh_sizes
from qwen3_moe_jax.jax_backend.device import Device
from qwen3_moe_jax.jax_backend.kv_cache import KVCache
from qwen3_moe_jax.kernels_pallas.decode_step.exchange import DEVICE_AXES
from qwen3_moe_jax.machine.cuda import without_peer_access
from qwen3_moe_jax.machine.memory import cache_nbytes

EP, TP = BOTH = DEVICE_AXES

MESH_AXES: Mapping[str, tuple[str, ...]] = {
    "heads": BOTH,
    "kv_heads": BOTH,
    "experts": (EP,),
    "expert_width": (TP,),
    "vocab": BOTH,
}
"""Axes of the mesh that split each logical axis."""

LOGICAL_AXES: Mapping[str, tuple[str | None, ...]] = {
    "self_attn.q_proj": ("heads", None),
    "self_attn.k_proj": ("kv_heads", None),
    "self_attn.v_proj": ("kv_heads", None),
    "self_attn.o_proj": (None, "heads"),
    "mlp.experts.gate_proj": ("experts", "expert_width", None),
    "mlp.experts.up_proj": ("experts", "expert_width", None),
    "mlp.experts.down_proj": ("experts", None, "expert_width"),
    "lm_head": ("vocab", None),
}
"""Logical axes of each tensor that is split, by its name in a layer. Others are whole everywhere."""

STAGE_AXES: Mapping[str, tuple[int, str]] = {
    **{name: (-2, "heads") for name in ("Qcur", "Qcur_normed", "Qcur_rope", "kqv_out")},
    **{name: (-2, "kv_heads") for name in ("Kcur", "Vcur", "Kcur_normed", "Kcur_rope")},
    **{name: (-1, "expert_width") for name in ("ffn_moe_gate", "ffn_moe_up", "ffn_moe_swiglu")},
}
"""Of stages of which a device has a part: the axis that is split, and what it is."""


@dataclass(frozen=True)
class MeshShape:
    """How many ways the model is split.

    Attributes:
      ep: groups of devices that have different experts.
      tp: devices of a group, each with a part of every expert's width.
    """

    ep: int = 1
    tp: int = 1

    @property
    def size(self) -> int:
        """Devices."""
        return self.ep * self.tp

    def __str__(self) -> str:
        return f"tp={self.tp},ep={self.ep}"

    @classmethod
    def parse(cls, text: str) -> "MeshShape":
        """``"tp=2,ep=1"``, in any order; what is left out is 1.

        Raises:
          ValueError: the text is something else.
        """
        return cls(**mesh_sizes(text))

    @classmethod
    def fitting(
        cls, config: Qwen3MoeConfig, types: Mapping[str, GGMLType], devices: int, processes: int = 1
    ) -> "MeshShape":
        """The shape that uses the most of ``devices``: experts by expert as far as that divides them.

        By expert a device reads whole matrices and no block is cut; but one sequence's experts are
        then on a few devices, and ``tp`` splits the rest. Each of ``processes`` has as many devices.

        Raises:
          OptionError: it cannot be split over so many processes.
        """
        shapes = [
            cls(ep, size // ep)
            for size in range(devices // processes * processes, 0, -processes)
            for ep in range(size, 0, -1)
            if size % ep == 0
        ]
        found = next((shape for shape in shapes if not shape.problems(config, types)), None)
        if found is None:
            why = shapes[-1].problems(config, types) if shapes else ["there are fewer devices"]
            raise OptionError(f"the model cannot be split over {processes} processes: {'; '.join(why)}")
        return found

    def problems(self, config: Qwen3MoeConfig, types: Mapping[str, GGMLType]) -> list[str]:
        """Why this model cannot be split so, with the numbers; empty where it can."""
        c, n = config, self.size
        found: list[str] = []
        if c.num_attention_heads % n:
            found.append(f"{c.num_attention_heads} attention heads are not a multiple of {n} devices")
        if c.num_key_value_heads % n and n % c.num_key_value_heads:
            found.append(f"{c.num_key_value_heads} KV heads and {n} devices do not divide each other")
        if c.num_experts % self.ep:
            found.append(f"{c.num_experts} experts are not a multiple of ep={self.ep}")
        if found or n == 1:
            return found
        for path, ggml_type, shape in _split_tensors(config, types):
            axes = logical_axes(path)
            block = BLOCK_FORMATS[ggml_type].weights
            ways = self.ways(axes[-1])
            if ways > 1 and shape[-1] % (ways * block):
                found.append(
                    f"{path} has {shape[-1]} columns: {ways} parts of {shape[-1] / ways:g} cut its "
                    f"{ggml_type.name} blocks of {block}"
                )
            rows = self.ways(axes[-2])
            if rows > 1 and shape[-2] % rows and axes[-2] != "kv_heads":
                found.append(f"{path} has {shape[-2]} rows, which are not a multiple of {rows}")
        return found[:3]

    def check(self, config: Qwen3MoeConfig, types: Mapping[str, GGMLType]) -> None:
        """Raises OptionError where this model cannot be split so."""
        if found := self.problems(config, types):
            raise OptionError(f"the model cannot be split as mesh {self}: {'; '.join(found)}")

    def ways(self, axis: str | None) -> int:
        """Parts that a logical axis is split into."""
        return int(np.prod([getattr(self, name) for name in MESH_AXES.get(axis or "", ())], dtype=int))

    def part(self, axis: str | None, index: int) -> int:
        """Which of these parts the device with this number has."""
        names = MESH_AXES.get(axis or "", ())
        place = {EP: index // self.tp, TP: index % self.tp}
        return index if names == BOTH else sum(place[name] for name in names)


def named_mesh(text: str) -> MeshShape | Literal["auto"]:
    """What ``--mesh`` says: "auto", or as ``MeshShape.parse``."""
    return "auto" if text == AUTO_MESH else MeshShape.parse(text)


def _split_tensors(
    config: Qwen3MoeConfig, types: Mapping[str, GGMLType]
) -> list[tuple[str, GGMLType, tuple[int, ...]]]:
    """Path, type and shape of each tensor that is split; one of several layers that are alike."""
    found: dict[tuple[str, GGMLType], tuple[str, GGMLType, tuple[int, ...]]] = {}
    for spec in tensor_specs(config):
        if any(logical_axes(spec.path)) and spec.path != "lm_head":
            name = spec.path.split(".", 2)[-1]
            found.setdefault((name, types[spec.path]), (spec.path, types[spec.path], spec.shape))
    return list(found.values())


def logical_axes(path: str) -> tuple[str | None, ...]:
    """Those of a parameter; empty where it is whole everywhere."""
    return LOGICAL_AXES.get(path.split(".", 2)[-1] if path.startswith("layers.") else path, ())


def _evenly(shape: MeshShape, devices: Sequence[Device]) -> list[Device]:
    """The first of each process' devices, process by process, so that the mesh has as many of each."""
    of: dict[int, list[Device]] = {}
    for device in devices:
        of.setdefault(process_of(device), []).append(device)
    each, rest = divmod(shape.size, len(of))
    if rest:
        raise OptionError(
            f"mesh {shape} has {shape.size} devices, which {len(of)} processes cannot share: "
            f"give a multiple of {len(of)}"
        )
    for process, its in of.items():
        if len(its) < each:
            raise OptionError(
                f"mesh {shape} needs {each} devices of each of {len(of)} processes, and process {process} "
                f"has {len(its)}"
            )
    return [device for process in sorted(of) for device in of[process][:each]]


def process_of(device: Device) -> int:
    """The number of the process that has a device."""
    return int(getattr(device, "process_index", 0))


CACHE_SPEC = P(None, None, None, BOTH)
"""Of a cache's array [L, B, S, K, ...]."""


def placed_on(mesh: Mesh, tree: Any) -> Any:
    """The sharding of each leaf of a state: caches by head, all else everywhere."""

    def place(node: Any) -> Any:
        spec = CACHE_SPEC if isinstance(node, KVCache) else P()
        return jax.tree.map(lambda _: NamedSharding(mesh, spec), node)

    return jax.tree.map(place, tree, is_leaf=lambda node: isinstance(node, KVCache))


@dataclass(frozen=True)
class Shards:
    """A model split over devices: static in jitted programs.

    Attributes:
      shape: how.
      config: of the whole model.
      mesh: the devices, axes "ep" and "tp".
    """

    shape: MeshShape
    config: Qwen3MoeConfig
    mesh: Mesh

    @classmethod
    def of(cls, shape: MeshShape, config: Qwen3MoeConfig, devices: Sequence[Device]) -> "Shards":
        """On the first devices of these: of each process, as many as of the others.

        Raises:
          OptionError: they are too few, or a process would have none, or fewer than another.
        """
        if len(devices) < shape.size:
            raise OptionError(f"mesh {shape} needs {shape.size} devices, and JAX has {len(devices)}")
        chosen = _evenly(shape, devices)
        grid = np.asarray(chosen, object).reshape(shape.ep, shape.tp)
        return cls(shape, config, Mesh(grid, BOTH))

    @property
    def devices(self) -> list[Device]:
        """All of them, those of other processes too, by number."""
        return list(self.mesh.devices.flat)

    @property
    def own_indices(self) -> list[int]:
        """The numbers of this process's devices."""
        process = jax.process_index()
        return [i for i, device in enumerate(self.devices) if process_of(device) == process]

    @property
    def processes(self) -> int:
        """Of how many processes its devices are."""
        return len({process_of(device) for device in self.devices})

    @property
    def own_devices(self) -> list[Any]:
        """Those of this process."""
        return [self.devices[index] for index in self.own_indices]

    def describe(self) -> str:
        """For people: the shape, and what each device has."""
        c, s = self.config, self.shape
        width = f", {c.moe_intermediate_size // s.tp} of {c.moe_intermediate_size} wide" if s.tp > 1 else ""
        of = f" of {self.processes} processes" if self.processes > 1 else ""
        return (
            f"{s}: {s.size} devices{of}, each with {c.num_attention_heads // s.size} of "
            f"{c.num_attention_heads} heads and {c.num_experts // s.ep} of {c.num_experts} experts{width}; "
            f"{self.collectives} collectives per step"
        )

    @property
    def reason_against_stores(self) -> str | None:
        """Why no kernel can write into the memory of all devices, or None; one kernel per token does."""
        if len(self.own_indices) < self.shape.size:
            return "it writes into the memory of all devices, and they belong to several processes"
        if self.devices[0].platform != "gpu":
            return None
        ordinals = [device.local_hardware_id for device in self.devices]
        if (pair := without_peer_access(ordinals)) is not None:
            return f"GPU {pair[0]} cannot write into the memory of GPU {pair[1]}"
        return None

    @property
    def collectives(self) -> int:
        """Collectives per step: the sums after attention and experts of each layer, and the head's gather."""
        gathers = self.is_head_split and not self.config.tie_word_embeddings
        return 2 * self.config.num_hidden_layers + gathers

    @property
    def is_head_split(self) -> bool:
        """Whether the vocabulary can be split: whole groups of rows that lie side by side."""
        return self.config.vocab_size % (self.shape.size * LANES) == 0

    @property
    def cache_heads(self) -> int:
        """KV heads of all devices together: more devices than heads have the same head several times."""
        return max(self.config.num_key_value_heads, self.shape.size)

    def cache_nbytes(self, length: int, itemsize: int) -> int:
        """Bytes of one device's part of a cache; arguments as ``memory.cache_nbytes``."""
        whole = cache_nbytes(self.config, length, itemsize)
        return whole * self.cache_heads // self.config.num_key_value_heads // self.shape.size

    def axes(self, path: str) -> tuple[str | None, ...]:
        """Logical axes of a parameter that are split on this mesh."""
        return () if path == "lm_head" and not self.is_head_split else logical_axes(path)

    def is_split(self, path: str) -> bool:
        """Whether devices have different parts of a parameter."""
        return any(self.axes(path))

    def shape_of(self, spec: TensorSpec) -> tuple[int, ...]:
        """A parameter's shape on one device."""
        return tuple(stop - start for start, stop in self.box(spec.path, spec.shape, 0))

    def box(self, path: str, shape: tuple[int, ...], index: int) -> Box:
        """What a device has of a parameter: of each axis the first index and the one after the last."""
        axes = self.axes(path) or (None,) * len(shape)
        return tuple(self._range(axis, size, index) for axis, size in zip(axes, shape, strict=True))

    def _range(self, axis: str | None, size: int, index: int) -> tuple[int, int]:
        ways, part = self.shape.ways(axis), self.shape.part(axis, index)
        heads = self.config.num_key_value_heads
        if axis == "kv_heads" and ways > heads:  # each device has the head that its queries read
            ways, part = heads, part * heads // ways
        return size * part // ways, size * (part + 1) // ways

    # Shardings of arrays

    def placed(self, shapes: Any) -> Any:
        """Shapes of a state or a cache with their shardings."""
        shape = jax.ShapeDtypeStruct
        places = placed_on(self.mesh, shapes)
        return jax.tree.map(lambda a, place: shape(a.shape, a.dtype, sharding=place), shapes, places)

    @property
    def everywhere(self) -> NamedSharding:
        """Of an array that is whole on every device."""
        return NamedSharding(self.mesh, P())

    @property
    def of_cache(self) -> NamedSharding:
        """Of a cache's arrays."""
        return NamedSharding(self.mesh, CACHE_SPEC)

    @property
    def stacked(self) -> NamedSharding:
        """Of an array whose first axis is the devices' parts one after the other."""
        return NamedSharding(self.mesh, P(BOTH))

    def split_names(self, params: Mapping[str, Any]) -> dict[str, bool]:
        """Of each stack, and each parameter outside the layers: whether devices have different parts."""
        stacks = {
            stack: self.is_split(f"layers.0.{tensor.name}")
            for tensor in params["layers"].tensors
            for stack in tensor.stacks
        }
        return {**stacks, **{name: self.is_split(name) for name in params if name != "layers"}}

    def param_specs(self, params: Mapping[str, Any]) -> dict[str, Any]:
        """Partition specs of the parameters, a prefix of their tree."""
        table = params["layers"]
        specs = {name: P(BOTH) if split else P() for name, split in self.split_names(params).items()}
        stacks = {name: specs[name] for name in table.stacks}
        alone = {name: specs[name] for name in params if name != "layers"}
        return {**alone, "layers": replace(table, stacks=stacks)}

    def stage_spec(self, name: str, in_layers: bool) -> P:
        """Of a stage as the network shows it: [L, B, T, ...] in the layers."""
        axis, logical = STAGE_AXES.get(name, (0, ""))
        if not logical:
            return P()
        ndim = 5 if in_layers else 4
        spec: list[Any] = [None] * ndim
        spec[axis] = MESH_AXES[logical]
        return P(*spec)
