"""From a model source to the parameter tree on a device, in the layout that the device reads best.

On the CPU every stack is one NumPy array that JAX uses in place. On a GPU the
bytes go up as the file has them and are re-arranged there, tensor by tensor,
into stacks that were allocated first; nothing is on the host or on the device
twice.
"""

from collections.abc import Mapping
from functools import partial
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from qwen3_moe_jax.convert.config import Qwen3MoeConfig
from qwen3_moe_jax.convert.ggml_types import GGMLType
from qwen3_moe_jax.convert.layouts.gpu_tiles import TILE_ROWS, TILED_TYPES, to_gpu_tiles
from qwen3_moe_jax.convert.layouts.lanes16 import supports, to_layout
from qwen3_moe_jax.convert.packed import LANES16, PackedTensor
from qwen3_moe_jax.convert.progress import ProgressCallback
from qwen3_moe_jax.convert.source import ModelSource
from qwen3_moe_jax.convert.tensor_names import tensor_specs
from qwen3_moe_jax.convert.unpack import aligned_empty, dequantize
from qwen3_moe_jax.jax_backend.device import Device
from qwen3_moe_jax.kernels_pallas import LayerTable
from qwen3_moe_jax.kernels_pallas.packed.stacks import Roles, abstract_packed, rows_per_unit

Params = dict[str, Any]
"""The model's parameters: "layers" is a ``LayerTable``; "embed_tokens", "norm", "lm_head" stand alone."""

Types = Mapping[str, GGMLType]
"""Quantization type of each parameter, by its path ("layers.3.mlp.router")."""

GPU_ROLES = {f"self_attn.{name}": "self_attn.qkv" for name in ("q_proj", "k_proj", "v_proj")}
"""The GPU's decode kernel reads queries, keys and values of a layer as one matrix."""

ROWS_ALWAYS = frozenset({"embed_tokens", "mlp.router"})
"""Kept in the file's order on a GPU: single rows are looked up, or the type is not quantized."""

Value = PackedTensor | np.ndarray | jax.Array


class _Placer(Protocol):
    """How tensors get to a device."""

    def whole(self, name: str, value: Value) -> Value:
        """A tensor that stands alone, on the device."""
        ...

    def room(self, name: str, rows: int, like: Value) -> Value:
        """An empty stack of ``rows`` rows for tensors like ``like``."""
        ...

    def put(self, name: str, stack: Value, first: int, value: Value) -> Value:
        """The stack with a tensor's rows from row ``first`` on."""
        ...

    def finish(self, stack: Value) -> Value:
        """The filled stack, on the device."""
        ...


def split_path(path: str) -> tuple[int | None, str]:
    """("layers.3.mlp.router") -> (3, "mlp.router"); the layer is None outside the layers."""
    if not path.startswith("layers."):
        return None, path
    _, layer, name = path.split(".", 2)
    return int(layer), name


def plan_layers(config: Qwen3MoeConfig, types: Types, roles: Roles) -> LayerTable:
    """Where every tensor of the layers will lie; the stacks are shapes in layout "rows"."""
    shapes: dict[str, tuple[int, ...]] = {}
    of_layers: list[dict[str, GGMLType]] = [{} for _ in range(config.num_hidden_layers)]
    for spec in tensor_specs(config):
        layer, name = split_path(spec.path)
        if layer is not None:
            shapes[name] = spec.shape
            of_layers[layer][name] = types[spec.path]
    return LayerTable.plan(shapes, of_layers, roles)


def abstract_params(config: Qwen3MoeConfig, types: Types, roles: Roles) -> Params:
    """The shapes of all parameters in layout "rows": vectors float32, everything else packed."""
    params: Params = {"layers": plan_layers(config, types, roles)}
    for spec in tensor_specs(config):
        if split_path(spec.path)[0] is None:
            is_vector = len(spec.shape) == 1
            params[spec.path] = (
                jax.ShapeDtypeStruct(spec.shape, jnp.float32)
                if is_vector
                else abstract_packed(types[spec.path], spec.shape)
            )
    return params


def tiled_params(params: Params) -> Params:
    """The shapes of ``abstract_params`` as a GPU holds them, matrices in tiles."""

    def tiles(name: str, value: Value) -> Value:
        return jax.eval_shape(partial(_rearranged, tiled=is_tiled(name, value)), value)

    table = params["layers"]
    stacks = {name: tiles(name.rpartition(".")[0] or name, w) for name, w in table.stacks.items()}
    whole = {name: tiles(name, w) for name, w in params.items() if name != "layers"}
    return {**whole, "layers": LayerTable(stacks, table.tensors)}


def load_params(
    source: ModelSource, roles: Roles, device: Device, progress: ProgressCallback | None = None
) -> Params:
    """Every tensor of ``source`` on ``device``, as the model's parameters.

    Norm weights become float32 vectors, everything else stays packed.
    """
    placer: _Placer = _OnHost(device) if device.platform == "cpu" else _OnDevice(device)
    plan = plan_layers(source.config, source.types, roles)
    tensors = {tensor.name: tensor for tensor in plan.tensors}
    stacks: dict[str, Value] = {}
    params: Params = {}
    for path, tensor in source.tensors(progress):
        value = dequantize(tensor) if tensor.ndim == 1 else tensor
        layer, name = split_path(path)
        if layer is None:
            params[path] = placer.whole(path, value)
            continue
        place, value = tensors[name], _flat(value)
        stack = place.stacks[place.which[layer]]
        if stack not in stacks:
            stacks[stack] = placer.room(name, plan.stacks[stack].shape[0], value)
        stacks[stack] = placer.put(name, stacks[stack], place.first[layer], value)
    finished = {name: placer.finish(stack) for name, stack in stacks.items()}
    params["layers"] = LayerTable(finished, plan.tensors)
    return params


def _flat(value: Value) -> Value:
    """The experts' matrices as rows one after the other; a vector as one row."""
    if not isinstance(value, PackedTensor):
        return value[None]
    return value if value.ndim == 2 else jax.tree.map(lambda a: a.reshape(-1, *a.shape[2:]), value)


def _unit(value: Value) -> int:
    return rows_per_unit(value.layout) if isinstance(value, PackedTensor) else 1


class _OnHost:
    """NumPy arrays that JAX's CPU backend uses without a copy, sixteen rows side by side where possible."""

    def __init__(self, device: Device):
        self._device = device

    def whole(self, name: str, value: Value) -> Value:
        return self.finish(self._arranged(value))

    def room(self, name: str, rows: int, like: Value) -> Value:
        arranged = self._arranged(like)
        units = rows // _unit(arranged)
        return jax.tree.map(lambda a: aligned_empty((units, *a.shape[1:]), a.dtype), arranged)

    def put(self, name: str, stack: Value, first: int, value: Value) -> Value:
        arranged = self._arranged(value)
        begin = first // _unit(arranged)

        def fill(target: np.ndarray, new: np.ndarray) -> None:
            target[begin : begin + len(new)] = new

        jax.tree.map(fill, stack, arranged)
        return stack

    def finish(self, stack: Value) -> Value:
        return jax.device_put(stack, self._device, may_alias=True)

    def _arranged(self, value: Value) -> Value:
        if isinstance(value, PackedTensor) and supports(LANES16, value.type, value.shape):
            return to_layout(value, LANES16)
        return value


class _OnDevice:
    """Arrays on a GPU, matrices as the tiles that its kernels read."""

    def __init__(self, device: Device):
        self._device = device

    def whole(self, name: str, value: Value) -> Value:
        return _rearrange(jax.device_put(value, self._device), is_tiled(name, value))

    def room(self, name: str, rows: int, like: Value) -> Value:
        arranged = jax.eval_shape(partial(_rearranged, tiled=is_tiled(name, like)), like)
        units = rows // _unit(arranged)
        return jax.tree.map(
            lambda a: jnp.zeros((units, *a.shape[1:]), a.dtype, device=self._device), arranged
        )

    def put(self, name: str, stack: Value, first: int, value: Value) -> Value:
        begin = first // _unit(stack)
        return _put_rows(stack, jax.device_put(value, self._device), begin, is_tiled(name, value))

    def finish(self, stack: Value) -> Value:
        return stack


def is_tiled(name: str, value: Value) -> bool:
    """Whether a matrix lies in tiles on a GPU."""
    if name in ROWS_ALWAYS or not isinstance(value, PackedTensor) or value.type not in TILED_TYPES:
        return False
    return value.shape[-2] % TILE_ROWS == 0 and value.shape[-1] % 256 == 0


def _rearranged(value: Value, tiled: bool) -> Value:
    return to_gpu_tiles(value, jnp) if tiled and isinstance(value, PackedTensor) else value


_rearrange = jax.jit(_rearranged, static_argnums=1)


@partial(jax.jit, donate_argnums=0, static_argnums=3)
def _put_rows(stack: Value, value: Value, begin: jax.Array, tiled: bool) -> Value:
    value = _rearranged(value, tiled)
    return jax.tree.map(lambda s, v: jax.lax.dynamic_update_slice_in_dim(s, v, begin, 0), stack, value)
