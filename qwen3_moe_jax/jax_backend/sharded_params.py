"""The parameters of a model that is split over devices: each holds its own part alone.

A tensor's rows that this process's devices have are read once, however many of them have these rows; of a
tensor that is split by columns, whole rows are read and cut, since blocks of a file lie row after row.
On a CPU a part goes into stacks on the host that JAX uses in place. On GPUs every tensor is one program of
all devices, which makes tiles and writes them into stacks that were allocated first.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from qwen3_moe_jax.convert.ggml_types import GGMLType
from qwen3_moe_jax.convert.layouts.gpu_tiles import to_gpu_tiles
from qwen3_moe_jax.convert.packed import LANES, Box, PackedTensor, packed_nbytes
from qwen3_moe_jax.convert.progress import ProgressCallback
from qwen3_moe_jax.convert.source import ModelSource
from qwen3_moe_jax.convert.tensor_names import tensor_specs
from qwen3_moe_jax.convert.unpack import dequantize
from qwen3_moe_jax.jax_backend.device import Device
from qwen3_moe_jax.jax_backend.host_load import Value, allocate, arranged_as, fill, flat, unit_of
from qwen3_moe_jax.jax_backend.params import Params, Types, device_params, is_tiled, split_path
from qwen3_moe_jax.jax_backend.sharding import BOTH, Shards
from qwen3_moe_jax.kernels_pallas import LayerTable, Matrices
from qwen3_moe_jax.machine import processes


def device_nbytes(shards: Shards, types: Mapping[str, GGMLType]) -> int:
    """Bytes of the packed weights that each device holds."""
    shape_of = shards.shape_of
    return sum(packed_nbytes(types[spec.path], shape_of(spec)) for spec in tensor_specs(shards.config))


def sharded_shapes(shards: Shards, types: Types, device: Device) -> Params:
    """The shapes and shardings of what ``load_sharded`` makes on devices such as ``device``."""
    local = device_params(shards.config, types, device, shards.shape_of)
    split = shards.split_names(local)

    def whole(name: str, value: Any) -> Any:
        shape_of = lambda a: _global_shape(shards, split[name], a.shape)
        place = _sharding(shards, split[name])
        return jax.tree.map(lambda a: jax.ShapeDtypeStruct(shape_of(a), a.dtype, sharding=place), value)

    table = local["layers"]
    stacks = {name: whole(name, stack) for name, stack in table.stacks.items()}
    alone = {name: whole(name, value) for name, value in local.items() if name != "layers"}
    return {**alone, "layers": LayerTable(stacks, table.tensors)}


def load_sharded(
    source: ModelSource, shards: Shards, device: Device, progress: ProgressCallback | None = None
) -> Params:
    """Every tensor of ``source`` on the devices of this process, as parameters of the whole mesh.

    Args:
      source: an open model, which checks what it reads.
      shards: the mesh.
      device: says what kind all devices are.
      progress: told how far loading is.

    Raises:
      ModelFileError: as ``source.part``.
    """
    local = device_params(shards.config, source.types, device, shards.shape_of)
    table = local["layers"]
    tensors = {tensor.name: tensor for tensor in table.tensors}
    stacks = (_HostStacks if device.platform == "cpu" else DeviceStacks)(local, shards)
    done = 0
    for path in source.paths():
        parts = read_parts(source, shards, path)
        layer, name = split_path(path)
        if layer is None:
            stacks.add(path, 0, parts)
        else:
            stack, first = tensors[name].place(layer)
            stacks.add(stack, first, {index: flat(part) for index, part in parts.items()})
        done += source.tensor_nbytes(path)
        if progress:
            progress(done, source.nbytes)
    layers = LayerTable({name: stacks.finished(name) for name in table.stacks}, table.tensors)
    return {**{name: stacks.finished(name) for name in local if name != "layers"}, "layers": layers}


Parts = dict[int, Value]
"""What devices have of a tensor, by their number; of one that all have, only the first's."""


def read_parts(source: ModelSource, shards: Shards, path: str) -> Parts:
    """The parts of this process's devices; rows that several of them have are read once."""
    shape = source.specs[path].shape
    rows_read: dict[Box, PackedTensor] = {}
    found: Parts = {}
    for index in shards.own_indices if shards.is_split(path) else shards.own_indices[:1]:
        *leading, columns = shards.box(path, shape, index)
        rows = (*leading, (0, shape[-1])) if leading else (columns,)
        if rows not in rows_read:
            rows_read[rows] = source.part(path, rows)
        whole = ((0, stop - start) for start, stop in leading)
        part = rows_read[rows].part((*whole, columns))
        found[index] = dequantize(part) if part.ndim == 1 else part
    return found


def _sharding(shards: Shards, is_split: bool) -> NamedSharding:
    return shards.stacked if is_split else shards.everywhere


def _global_shape(shards: Shards, is_split: bool, shape: tuple[int, ...]) -> tuple[int, ...]:
    return (shape[0] * shards.shape.size, *shape[1:]) if is_split else shape


def _joined(shards: Shards, is_split: bool, parts: Parts) -> Any:
    """Arrays of the whole mesh; a CPU uses those of the host without a copy."""
    numbers = list(parts)

    def join(*arrays: Any) -> jax.Array:
        of = (
            dict(zip(numbers, arrays, strict=True))
            if is_split
            else dict.fromkeys(shards.own_indices, arrays[0])
        )
        placed = [jax.device_put(a, shards.devices[i], may_alias=True) for i, a in of.items()]
        shape = _global_shape(shards, is_split, arrays[0].shape)
        return jax.make_array_from_single_device_arrays(shape, _sharding(shards, is_split), placed)

    return jax.tree.map(join, *parts.values())


class _HostStacks:
    """Stacks on the host, one for each device; one for all where they have the same."""

    def __init__(self, local: Params, shards: Shards):
        self._local = local
        self._split = shards.split_names(local)
        self._shards = shards
        self._stacks: dict[str, Parts] = {}

    def add(self, stack: str, first: int, parts: Parts) -> None:
        """Writes what devices have of a tensor from row ``first`` of their stacks on."""
        own = self._stacks.setdefault(stack, {})
        stacks = self._local["layers"].stacks
        for index, part in parts.items():
            if stack not in stacks:  # it stands alone
                own[index] = arranged_as(self._local[stack], part)
                continue
            value = arranged_as(stacks[stack], part)
            if index not in own:
                own[index] = allocate(stacks[stack])
            fill(own[index], first, value)

    def finished(self, stack: str) -> Any:
        """The stack on all devices."""
        return _joined(self._shards, self._split[stack], self._stacks.pop(stack))


class DeviceStacks:
    """Stacks on the devices, matrices in tiles; one program of all devices writes a tensor's parts."""

    def __init__(self, local: Params, shards: Shards):
        self._split, self._shards = shards.split_names(local), shards
        everything = {**local["layers"].stacks, **{n: w for n, w in local.items() if n != "layers"}}
        self._stacks = {name: self._zeros(name, stack) for name, stack in everything.items()}

    def _zeros(self, name: str, stack: Value) -> Any:
        place = _sharding(self._shards, self._split[name])

        def zeros(a: Any) -> jax.Array:
            shape = _global_shape(self._shards, self._split[name], a.shape)
            return jnp.zeros(shape, a.dtype, device=place)

        return jax.tree.map(zeros, stack)

    def add(self, stack: str, first: int, parts: Parts) -> None:
        """As on the host."""
        sent = _joined(self._shards, self._split[stack], parts)
        into = self._stacks[stack]
        self._stacks[stack] = _put(
            into,
            sent,
            np.int32(first // unit_of(into)),
            mesh=self._shards.mesh,
            spec=P(BOTH) if self._split[stack] else P(),
            tiled=is_tiled(into),
        )
        jax.block_until_ready(sent)

    def finished(self, stack: str) -> Any:
        """The stack on all devices."""
        return self._stacks.pop(stack)


@partial(jax.jit, static_argnames=("mesh", "spec", "tiled"), donate_argnames=("stack",))
def _put(stack: Any, value: Any, first: jax.Array, *, mesh: Mesh, spec: P, tiled: bool) -> Any:
    """Each device's stack with its part from unit ``first`` on."""

    def put(stack: Any, value: Any, first: jax.Array) -> Any:
        arranged = to_gpu_tiles(value, jnp) if tiled else value
        return jax.tree.map(
            lambda whole, part: jax.lax.dynamic_update_slice_in_dim(whole, part, first, 0), stack, arranged
        )

    specs = (spec, spec, P())
    return jax.shard_map(put, mesh=mesh, in_specs=specs, out_specs=spec, check_vma=False)(stack, value, first)


def connect(shards: Shards) -> None:
    """A first sum over all devices, begun by all processes at once.

    For that gloo, a CPU's collectives, waits 30 s for the others, no longer; they may be further apart when
    a program of the model has been compiled.
    """
    parts = jnp.zeros((shards.shape.size,), device=shards.stacked)
    add = lambda part: jax.lax.psum(part, BOTH)
    run = jax.shard_map(add, mesh=shards.mesh, in_specs=P(BOTH), out_specs=P(), check_vma=False)
    program = jax.jit(run).lower(parts).compile()
    processes.everyones("first sum", None)
    jax.block_until_ready(program(parts))


def dequantized_tile(
    params: Params,
    shards: Shards,
    path: str,
    tile: int,
    expert: int | None,
    dequantize_rows: Callable[[Matrices], jax.Array],
) -> np.ndarray:
    """As ``Runner.dequantized``: LANES rows of a matrix as float32, from the devices that have them.

    Args:
      params: of ``load_sharded``.
      path: of a packed tensor.
      tile: which LANES rows, of an expert's matrix where one is named.
      expert: None is all matrices, one after the other.
      dequantize_rows: all rows of a matrix.
    """
    shape = next(spec.shape for spec in tensor_specs(shards.config) if spec.path == path)
    height = math.prod(shape[:-1]) if expert is None else shape[-2]
    above = (expert or 0) * height
    rows = range(above + LANES * tile, above + min(LANES * (tile + 1), height))
    result = np.zeros((len(rows), shape[-1]), np.float32)
    is_here = np.zeros(result.shape, bool)
    for index in shards.own_indices:
        *_, (first_column, last_column) = shards.box(path, shape, index)
        stack, first = on_device(params, shards.devices[index], path)
        for whole, local, count in _runs(shards.box(path, shape, index), shape, rows):
            w = Matrices(stack, jnp.int32(first + local), (count, last_column - first_column))
            place = slice(whole - rows.start, whole - rows.start + count)
            result[place, first_column:last_column] = np.asarray(dequantize_rows(w))
            is_here[place, first_column:last_column] = True
    return result if shards.processes == 1 else _of_all(result, is_here)


def _of_all(values: np.ndarray, is_here: np.ndarray) -> np.ndarray:
    """Float32 values of which each process has those where ``is_here``."""
    packed = lambda array: processes.everyones_bytes("weights", np.ascontiguousarray(array).tobytes())
    result = values.copy()
    for part, mask in zip(packed(values), packed(is_here), strict=True):
        known = np.frombuffer(mask, bool).reshape(values.shape)
        result[known] = np.frombuffer(part, np.float32).reshape(values.shape)[known]
    return result


def _runs(box: Box, shape: tuple[int, ...], rows: range) -> Iterator[tuple[int, int, int]]:
    """Which rows lie in a box: the first of a run in the whole tensor and in the box, and how many."""
    *experts, (first, last), _ = box
    begin, end = experts[0] if experts else (0, 1)
    for expert in range(begin, end):
        top = expert * shape[-2]
        start, stop = max(rows.start, top + first), min(rows.stop, top + last)
        if start < stop:
            yield start, (expert - begin) * (last - first) + start - top - first, stop - start


def on_device(params: Params, device: Device, path: str) -> tuple[Any, int]:
    """A device's part of the stack that has a tensor, and the tensor's first row there."""
    layer, name = split_path(path)
    value, first = params.get(path), 0
    if layer is not None:
        tensor = params["layers"][name]
        value, first = tensor.options[tensor.which[layer]], tensor.first[layer]
    own = lambda a: next(shard.data for shard in a.addressable_shards if shard.device == device)
    return jax.tree.map(own, value), first
