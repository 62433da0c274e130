"""What a program's arguments say of it: their shapes, and where they lie."""

from collections.abc import Hashable, Mapping
from typing import Any

import jax
import numpy as np
from jax.core import Tracer
from jax.sharding import Mesh, NamedSharding, SingleDeviceSharding

from qwen3_moe_jax.jax_backend.program_key import TRACE_SETTINGS
from qwen3_moe_jax.jax_backend.sharding import Shards

Key = tuple[tuple[Hashable, ...], Any, tuple[Any, ...]]
"""Of a program in memory."""


def memory_key(static: dict[str, Any], dynamic: dict[str, Any]) -> Key | None:
    """What a program in memory is found by; None for a trace's values, which no program takes.

    It is made at every call, while the device waits: no text, and each argument is looked at once.
    """
    leaves, tree = jax.tree.flatten(dynamic)
    arrays = tuple(map(_key_of, leaves))
    if None in arrays:
        return None
    settings = tuple(getattr(jax.config, name) for name in TRACE_SETTINGS)
    return (*static.values(), *settings), tree, arrays


def _key_of(leaf: Any) -> tuple[Hashable, ...] | None:
    """Shape, dtype and weakness of an argument, and its mesh's sharding; None of a trace's value."""
    if isinstance(leaf, Tracer):
        return None
    aval = getattr(leaf, "aval", None)
    if aval is None:
        return *_shaped(leaf), _sharding(leaf)
    return aval.shape, aval.dtype, aval.weak_type, _sharding(leaf)


def mesh_of(static: Mapping[str, Any], dynamic: Mapping[str, Any]) -> Mesh | None:
    """The mesh that a program's arguments name, or lie on; None on one device."""
    for value in static.values():
        shards = value if isinstance(value, Shards) else getattr(value, "shards", None)
        if isinstance(shards, Shards):
            return shards.mesh
    shardings = filter(None, map(_sharding, jax.tree.leaves(dynamic)))
    return next((s.mesh for s in shardings if isinstance(s.mesh, Mesh)), None)


def _sharding(leaf: Any) -> NamedSharding | None:
    """Where an argument lies, if that is on several devices."""
    sharding = getattr(leaf, "sharding", None)
    if type(sharding) is SingleDeviceSharding:
        return None
    return sharding if isinstance(sharding, NamedSharding) and sharding.mesh.size > 1 else None


def aval_of(leaf: Any) -> tuple[tuple[int, ...], str, bool]:
    """Shape, dtype and weakness of an argument: what a compiled program demands of it."""
    shape, dtype, is_weak = _shaped(leaf)
    return shape, str(dtype), is_weak


def _shaped(leaf: Any) -> tuple[tuple[int, ...], Any, bool]:
    if isinstance(leaf, (jax.Array, jax.ShapeDtypeStruct, np.ndarray, np.generic)):
        return tuple(leaf.shape), leaf.dtype, bool(getattr(leaf, "weak_type", False))
    aval = jax.typeof(leaf)
    return tuple(aval.shape), aval.dtype, bool(aval.weak_type)
