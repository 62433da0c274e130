"""From a model source to the parameter tree on a device, in the layout that the device reads best.

On the CPU every stack is one NumPy array that JAX uses in place, of memory or of a file that is mapped. On a
GPU the bytes go up as the file has them and are unpacked and re-arranged there (``device_load``), into stacks
that were allocated first; nothing is on the host or on the device twice.
"""

import math
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from qwen3_moe_jax.convert.config import Qwen3MoeConfig
from qwen3_moe_jax.convert.ggml_types import SUPERBLOCK, GGMLType
from qwen3_moe_jax.convert.layouts.gpu_tiles import TILE_ROWS, TILED_TYPES, to_gpu_tiles
from qwen3_moe_jax.convert.layouts.lanes16 import supports
from qwen3_moe_jax.convert.packed import GPU_TILES, LANES, LANES16, PackedTensor
from qwen3_moe_jax.convert.progress import ProgressCallback
from qwen3_moe_jax.convert.source import ModelSource
from qwen3_moe_jax.convert.tensor_names import TensorSpec, tensor_specs
from qwen3_moe_jax.convert.unpack import dequantize, empty_packed
from qwen3_moe_jax.jax_backend import host_load
from qwen3_moe_jax.jax_backend.device import Device
from qwen3_moe_jax.jax_backend.device_load import Target, allocate, load_stacks, wanted_programs
from qwen3_moe_jax.jax_backend.host_load import HostLoader, Value
from qwen3_moe_jax.jax_backend.mapped_weights import load_mapped
from qwen3_moe_jax.jax_backend.settings import own_settings
from qwen3_moe_jax.jax_backend.wanted import Wanted
from qwen3_moe_jax.kernels_pallas import LayerTable
from qwen3_moe_jax.kernels_pallas.packed.stacks import Roles, abstract_packed
from qwen3_moe_jax.machine.memory import MemoryPlan
from qwen3_moe_jax.machine.threads import SHORT_TURN, shares_the_lock

Params = dict[str, Any]
"""The model's parameters: "layers" is a ``LayerTable``; "embed_tokens", "norm", "lm_head" stand alone."""

Types = Mapping[str, GGMLType]
"""Quantization type of each parameter, by its path ("layers.3.mlp.router")."""

GPU_ROLES = {f"self_attn.{name}": "self_attn.qkv" for name in ("q_proj", "k_proj", "v_proj")}
"""The GPU's decode kernel reads queries, keys and values of a layer as one matrix."""

LOAD_COMPILERS = 4
"""Threads that make the programs of a load."""

ROWS_ALWAYS = frozenset({"embed_tokens", "mlp.router"})
"""Kept in the file's order on a GPU: single rows are looked up, or the type is not quantized."""


def split_path(path: str) -> tuple[int | None, str]:
    """("layers.3.mlp.router") -> (3, "mlp.router"); the layer is None outside the layers."""
    if not path.startswith("layers."):
        return None, path
    _, layer, name = path.split(".", 2)
    return int(layer), name


ShapeOf = Callable[[TensorSpec], tuple[int, ...]]
"""A tensor's shape on one device."""


def whole_shape(spec: TensorSpec) -> tuple[int, ...]:
    """The shape on a device that has all of a model."""
    return spec.shape


def plan_layers(
    config: Qwen3MoeConfig, types: Types, roles: Roles, shape_of: ShapeOf = whole_shape
) -> LayerTable:
    """Where every tensor of the layers will lie; the stacks are shapes in layout "rows"."""
    shapes: dict[str, tuple[int, ...]] = {}
    of_layers: list[dict[str, GGMLType]] = [{} for _ in range(config.num_hidden_layers)]
    for spec in tensor_specs(config):
        layer, name = split_path(spec.path)
        if layer is not None:
            shapes[name] = shape_of(spec)
            of_layers[layer][name] = types[spec.path]
    return LayerTable.plan(shapes, of_layers, roles)


def abstract_params(
    config: Qwen3MoeConfig, types: Types, roles: Roles, shape_of: ShapeOf = whole_shape
) -> Params:
    """The shapes of all parameters in layout "rows": vectors float32, everything else packed."""
    params: Params = {"layers": plan_layers(config, types, roles, shape_of)}
    for spec in tensor_specs(config):
        if split_path(spec.path)[0] is None:
            is_vector = len(spec.shape) == 1
            params[spec.path] = (
                jax.ShapeDtypeStruct(shape_of(spec), jnp.float32)
                if is_vector
                else abstract_packed(types[spec.path], shape_of(spec))
            )
    return params


def tiled_params(params: Params) -> Params:
    """The shapes of ``abstract_params`` as a GPU holds them, matrices in tiles."""

    def tiles(name: str, value: Value, rows: int) -> Value:
        name = name.removesuffix(f".{value.type.name}") if isinstance(value, PackedTensor) else name
        return (
            tiled_shape(value) if isinstance(value, PackedTensor) and _is_tiled(name, value, rows) else value
        )

    return _each(tiles, params)


def tiled_shape(value: PackedTensor) -> PackedTensor:
    """The shapes of ``to_gpu_tiles`` of these, from those of one tile: no program is traced for them."""
    *leading, rows, columns = value.shape
    tiles = (*leading, rows // TILE_ROWS, columns // SUPERBLOCK)
    arrays = {n: jax.ShapeDtypeStruct((*tiles, *a.shape[2:]), a.dtype) for n, a in _tile(value.type).items()}
    return PackedTensor(arrays, value.type, GPU_TILES)


@cache
def _tile(type: GGMLType) -> Mapping[str, np.ndarray]:
    """The arrays of one tile."""
    return to_gpu_tiles(empty_packed(type, (TILE_ROWS, SUPERBLOCK))).arrays


def laned_params(params: Params) -> Params:
    """The shapes of ``abstract_params`` as a CPU holds them, sixteen rows of a matrix side by side."""
    return _each(_laned, params)


def _each(change: Callable[[str, Value, int], Value], params: Params) -> Params:
    """Every stack and tensor changed, by its name and the rows that its matrices are multiples of."""
    table = params["layers"]
    rows = table.matrix_rows()
    stacks = {name: change(name, w, rows.get(name, 0)) for name, w in table.stacks.items()}
    whole = {name: change(name, w, w.shape[0]) for name, w in params.items() if name != "layers"}
    return {**whole, "layers": LayerTable(stacks, table.tensors)}


def _laned(_: str, value: Value, rows: int) -> Value:
    if not (isinstance(value, PackedTensor) and supports(LANES16, value.type, (rows, value.shape[-1]))):
        return value
    return PackedTensor({name: laned_shape(a) for name, a in value.arrays.items()}, value.type, LANES16)


def laned_shape(array: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
    """Of an array [..., N, C] of layout "rows", what it is in layout "lanes16"."""
    *leading, rows, columns = array.shape
    is_byte = array.dtype.itemsize == 1
    shape = (*leading, rows // LANES, columns // 4 if is_byte else columns, LANES)
    return jax.ShapeDtypeStruct(shape, np.uint32 if is_byte else array.dtype)


def device_params(
    config: Qwen3MoeConfig, types: Types, device: Device, shape_of: ShapeOf = whole_shape
) -> Params:
    """The shapes of what ``load_params`` puts on ``device``: enough to make programs without weights."""
    if device.platform == "cpu":
        return laned_params(abstract_params(config, types, {}, shape_of))
    return tiled_params(abstract_params(config, types, GPU_ROLES, shape_of))


def load_params(
    source: ModelSource,
    roles: Roles,
    device: Device,
    progress: ProgressCallback | None = None,
    plan: MemoryPlan | None = None,
) -> Params:
    """Every tensor of ``source`` on ``device``, as the model's parameters.

    Norm weights become float32 vectors, everything else stays packed.

    Args:
      source: the model.
      roles: of the tensors that share stacks.
      device: where they go.
      progress: told how far it is.
      plan: says whether a CPU's weights stay in a file; None is no.

    Raises:
      MemoryPlanError: they would, and the disk cannot have the file.
    """
    if device.platform == "cpu":
        return load_on_host(source, roles, device, progress, plan)
    return load_on_device(source, roles, device, progress)


def load_on_host(
    source: ModelSource,
    roles: Roles,
    device: Device,
    progress: ProgressCallback | None = None,
    plan: MemoryPlan | None = None,
) -> Params:
    """NumPy arrays that JAX's CPU backend uses without a copy, sixteen rows side by side where possible."""
    shapes = laned_params(abstract_params(source.config, source.types, roles))
    fill = partial(fill_on_host, source, progress=progress)
    if plan is not None and plan.is_mapped:
        params = load_mapped(source, plan, shapes, fill, progress)
    else:
        params = host_load.allocate(shapes)
        fill(params)
    return jax.tree.map(partial(jax.device_put, device=device, may_alias=True), params)


def fill_on_host(source: ModelSource, params: Params, progress: ProgressCallback | None = None) -> None:
    """Writes every tensor to its place in arrays of ``laned_params``, of memory or of a file."""
    table, done = params["layers"], 0
    tensors = {tensor.name: tensor for tensor in table.tensors}
    with HostLoader(source) as loader:
        for path in source.paths():
            layer, name = split_path(path)
            if len(source.specs[path].shape) == 1:
                vectors = params[path] if layer is None else table.stacks[name][layer]
                vectors[:] = dequantize(source.tensor(path))
            elif layer is None:
                loader.put(path, params[path])
            else:
                stack, first = tensors[name].place(layer)
                loader.put(path, table.stacks[stack], first)
            done += source.tensor_nbytes(path)
            if progress:
                progress(done, source.nbytes)


def load_on_device(
    source: ModelSource, roles: Roles, device: Device, progress: ProgressCallback | None = None
) -> Params:
    """Arrays as a GPU's kernels read them, matrices in tiles; see ``device_load``."""
    shapes, targets = device_plan(source, roles)
    table = shapes["layers"]
    packed = _packed_of(shapes)
    with shares_the_lock(SHORT_TURN), ThreadPoolExecutor(LOAD_COMPILERS + 1, "programs") as pool:
        empty = pool.submit(_allocate, packed)
        for wanted in wanted_programs(source, targets, packed):
            pool.submit(_prepare, wanted)
        small = pool.submit(_vectors, source, table)
        if progress:
            progress(0, source.nbytes)  # the device is busy, and the interpreter is not
        stacks: dict[str, Any] = empty.result()
        done = 0
        for nbytes in load_stacks(source, targets, stacks, device):
            done += nbytes
            if progress:
                progress(done, source.nbytes)
        vectors, nbytes = small.result()
        if progress:
            progress(done + nbytes, source.nbytes)
    found = {**stacks, **jax.device_put(vectors, device)}
    layers = LayerTable({name: found[name] for name in table.stacks}, table.tensors)
    return {**{name: found[name] for name in shapes if name != "layers"}, "layers": layers}


def _allocate(shapes: Any) -> Any:
    with own_settings():
        return allocate(shapes)


def _prepare(wanted: Wanted) -> None:
    with own_settings():
        wanted.make()


def device_plan(source: ModelSource, roles: Roles) -> tuple[Params, list[Target]]:
    """The shapes of the parameters on a GPU, and where each packed tensor goes, in the source's order."""
    shapes = tiled_params(abstract_params(source.config, source.types, roles))
    tensors = {tensor.name: tensor for tensor in shapes["layers"].tensors}
    targets: list[Target] = []
    for path in source.paths():
        shape, kind = source.specs[path].shape, source.types[path]
        if len(shape) == 1:
            continue
        layer, name = split_path(path)
        stack, first = path, 0
        if layer is not None:
            stack, first = tensors[name].place(layer)
        tiled = is_tiled(shapes["layers"].stacks[stack] if layer is not None else shapes[stack])
        targets.append(Target(path, stack, first, kind, math.prod(shape[:-1]), shape[-1], tiled))
    return shapes, targets


def _packed_of(shapes: Params) -> dict[str, Any]:
    """The packed stacks and tensors of all shapes, by name."""
    everything = {**shapes["layers"].stacks, **{n: w for n, w in shapes.items() if n != "layers"}}
    return {name: w for name, w in everything.items() if isinstance(w, PackedTensor)}


def _vectors(source: ModelSource, table: LayerTable) -> tuple[dict[str, np.ndarray], int]:
    """The norms, those of all layers as one array [L, n], and how many bytes of the source they are."""
    found: dict[str, np.ndarray] = {}
    nbytes = 0
    for path in source.paths():
        if len(source.specs[path].shape) > 1:
            continue
        value = dequantize(source.tensor(path))
        nbytes += source.tensor_nbytes(path)
        layer, name = split_path(path)
        if layer is None:
            found[name] = value
        else:
            found.setdefault(name, np.empty(table.stacks[name].shape, np.float32))[layer] = value
    return found, nbytes


def is_tiled(value: Value) -> bool:
    """Whether these shapes of :func:`device_params` are those of tiles."""
    return isinstance(value, PackedTensor) and value.layout == GPU_TILES


def _is_tiled(name: str, value: Value, rows: int) -> bool:
    if name in ROWS_ALWAYS or not isinstance(value, PackedTensor) or value.type not in TILED_TYPES:
        return False
    return rows % TILE_ROWS == 0 and value.shape[-1] % SUPERBLOCK == 0
