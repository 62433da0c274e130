"""From a model source to the parameter tree on a device, in the layout that the device reads best.

On the CPU every stack is one NumPy array that JAX uses in place. On a GPU the
bytes go up as the file has them and are re-arranged there, tensor by tensor,
into stacks that were allocated first; nothing is on the host or on the device
twice.
"""

import math
from functools import partial
from typing import Protocol

import jax
import jax.numpy as jnp
import numpy as np

from convert.config import Qwen3MoeConfig
from convert.ggml_types import GGMLType
from convert.gpu_tiles import TILE_ROWS, TILED_TYPES, to_gpu_tiles
from convert.layouts import supports, to_layout
from convert.model_source import ModelSource
from convert.packed import ARRAY_FORMATS, LANES, LANES16, PackedTensor, array_shapes
from convert.progress import ProgressCallback
from convert.tensor_names import tensor_specs
from convert.unpack import aligned_empty, dequantize
from kernels_pallas.matrices import rows_a_unit
from qwen3_moe_jax.generate import Params
from qwen3_moe_jax.stacks import Roles, Types, stack_layers

GPU_ROLES = {f"self_attn.{name}": "self_attn.qkv" for name in ("q_proj", "k_proj", "v_proj")}
"""The GPU's decode kernel reads queries, keys and values of a layer as one matrix."""

ROWS_ALWAYS = frozenset({"embed_tokens", "mlp.router"})
"""Kept in the file's order on a GPU: single rows are looked up, or the type is not quantized."""

Value = PackedTensor | np.ndarray | jax.Array
Shape = PackedTensor | jax.ShapeDtypeStruct
"""A value's shapes and dtypes; a packed tensor of them."""


class _Placer(Protocol):
    """How tensors get to a device."""

    def shape(self, name: str, like: Value | Shape) -> Shape:
        """Of a tensor like this when it is on the device."""

    def whole(self, name: str, value: Value) -> Value:
        """A tensor that stands alone, on the device."""

    def room(self, shape: Shape) -> Value:
        """An empty stack of this shape."""

    def put(self, name: str, stack: Value, first: int, value: Value) -> Value:
        """The stack with a tensor's rows from row ``first`` on."""

    def finish(self, stack: Value) -> Value:
        """The filled stack, on the device."""


def load_params(
    source: ModelSource, roles: Roles, device: jax.Device, progress: ProgressCallback | None = None
) -> Params:
    """Every tensor of ``source`` on ``device``, as the model's parameter tree (``model.zero_params``).

    Norm weights become float32 vectors, everything else stays packed.
    """
    placer = _placer(device)
    places, _ = stack_layers(source.config, source.types, roles)
    shapes = param_shapes(source.config, source.types, roles, device)["stacks"]
    stacks: dict[str, Value] = {}
    params: Params = {}
    for path, tensor in source.tensors(progress):
        value = dequantize(tensor) if tensor.ndim == 1 else tensor
        place = places.get(path)
        if place is None:
            params[path] = placer.whole(path, value)
            continue
        if place.stack not in stacks:
            stacks[place.stack] = placer.room(shapes[place.stack])
        role = _role(place.stack)
        stacks[place.stack] = placer.put(role, stacks[place.stack], place.first, _flat(value))
    params["stacks"] = {name: placer.finish(stack) for name, stack in stacks.items()}
    return params


def param_shapes(config: Qwen3MoeConfig, types: Types, roles: Roles, device: jax.Device) -> Params:
    """The tree of ``load_params`` with ``jax.ShapeDtypeStruct`` in place of arrays."""
    placer = _placer(device)
    places, shapes = stack_layers(config, types, roles)
    params: Params = {}
    stacks: dict[str, Shape] = {}
    for spec in tensor_specs(config):
        ggml_type = None if len(spec.shape) == 1 else types[spec.path]
        place = places.get(spec.path)
        if place is None:
            params[spec.path] = placer.shape(spec.path, _file_shape(spec.shape, ggml_type))
        elif place.stack not in stacks:
            like = _file_shape((math.prod(spec.shape[:-1]), spec.shape[-1]), ggml_type)
            one = placer.shape(_role(place.stack), like)
            units = shapes[place.stack].rows // _unit(one)
            stacks[place.stack] = jax.tree.map(
                lambda a, n=units: jax.ShapeDtypeStruct((n, *a.shape[1:]), a.dtype), one
            )
    params["stacks"] = stacks
    sharding = jax.sharding.SingleDeviceSharding(device)
    return jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=sharding), params)


def _placer(device: jax.Device) -> _Placer:
    return _OnHost(device) if device.platform == "cpu" else _OnDevice(device)


def _role(stack: str) -> str:
    """The role of a stack, "mlp.router" of "mlp.router.F32"; a norm weight's has no type in its name."""
    return stack.rpartition(".")[0] or stack


def _file_shape(shape: tuple[int, ...], ggml_type: GGMLType | None) -> Shape:
    """A tensor as a file's reader gives it; float32 without a type."""
    if ggml_type is None:
        return jax.ShapeDtypeStruct(shape, jnp.float32)
    formats, shapes = ARRAY_FORMATS[ggml_type], array_shapes(ggml_type, shape)
    return PackedTensor({n: jax.ShapeDtypeStruct(s, formats[n].dtype) for n, s in shapes.items()}, ggml_type)


def _flat(value: Value) -> Value:
    """The experts' matrices as rows one after the other; a vector as one row."""
    if not isinstance(value, PackedTensor):
        return value[None]
    return value if value.ndim == 2 else jax.tree.map(lambda a: a.reshape(-1, *a.shape[2:]), value)


def _unit(value: Value | Shape) -> int:
    return rows_a_unit(value.layout) if isinstance(value, PackedTensor) else 1


class _OnHost:
    """NumPy arrays that JAX's CPU backend uses without a copy, sixteen rows side by side where possible."""

    def __init__(self, device: jax.Device):
        self._device = device

    def whole(self, name: str, value: Value) -> Value:
        return self.finish(self._arranged(value))

    def shape(self, name: str, like: Value | Shape) -> Shape:
        if not _has_lanes(like):
            return _shape_of(like)
        few = jax.tree.map(lambda a: np.zeros((LANES, *a.shape[1:]), a.dtype), like)
        units = like.shape[0] // LANES
        return jax.tree.map(
            lambda a: jax.ShapeDtypeStruct((units, *a.shape[1:]), a.dtype), to_layout(few, LANES16)
        )

    def room(self, shape: Shape) -> Value:
        return jax.tree.map(lambda a: aligned_empty(a.shape, a.dtype), shape)

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
        return to_layout(value, LANES16) if _has_lanes(value) else value


def _has_lanes(value: Value | Shape) -> bool:
    return isinstance(value, PackedTensor) and supports(LANES16, value.type, value.shape)


def _shape_of(value: Value | Shape) -> Shape:
    return jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), value)


class _OnDevice:
    """Arrays on a GPU, matrices as the tiles that its kernels read."""

    def __init__(self, device: jax.Device):
        self._device = device

    def shape(self, name: str, like: Value | Shape) -> Shape:
        return jax.eval_shape(partial(_rearranged, tiled=is_tiled(name, like)), _shape_of(like))

    def whole(self, name: str, value: Value) -> Value:
        return _rearrange(jax.device_put(value, self._device), is_tiled(name, value))

    def room(self, shape: Shape) -> Value:
        return jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype, device=self._device), shape)

    def put(self, name: str, stack: Value, first: int, value: Value) -> Value:
        begin = first // _unit(stack)
        return _put_rows(stack, jax.device_put(value, self._device), begin, is_tiled(name, value))

    def finish(self, stack: Value) -> Value:
        return stack


def is_tiled(name: str, value: Value | Shape) -> bool:
    """Whether a matrix lies in tiles on a GPU."""
    if name in ROWS_ALWAYS or not isinstance(value, PackedTensor) or value.type not in TILED_TYPES:
        return False
    return value.shape[-2] % TILE_ROWS == 0 and value.shape[-1] % 256 == 0


def _rearranged(value: Value, tiled: bool) -> Value:
    return to_gpu_tiles(value, jnp) if tiled else value


_rearrange = jax.jit(_rearranged, static_argnums=1)


@partial(jax.jit, donate_argnums=0, static_argnums=3)
def _put_rows(stack: Value, value: Value, begin: jax.Array, tiled: bool) -> Value:
    value = _rearranged(value, tiled)
    return jax.tree.map(lambda s, v: jax.lax.dynamic_update_slice_in_dim(s, v, begin, 0), stack, value)
