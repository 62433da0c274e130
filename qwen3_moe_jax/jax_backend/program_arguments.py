"""What a program's arguments say of it: their shapes, and where they lie."""

from collections.abc import Hashable, Mapping
from functools import cache
from typing import Any

import jax
import numpy as np
from jax.core import Tracer
from jax.sharding import Mesh, NamedSharding

from qwen3_moe_jax.jax_backend.program_key import TRACE_SETTINGS
from qwen3_moe_jax.jax_backend.sharding import Shards

Key = tuple[tuple[Hashable, ...], Any, tuple[Any, ...]]
"""Of a program in memory."""


def is_traced(values: Any) -> bool:
    """Whether some of these are a trace's and not values."""
    return any(isinstance(leaf, Tracer) for leaf in jax.tree.leaves(values))


def memory_key(static: dict[str, Any], dynamic: dict[str, Any]) -> Key:
    """What a program in memory is found by."""
    leaves, tree = jax.tree.flatten(dynamic)
    settings = tuple(getattr(jax.config, name) for name in TRACE_SETTINGS)
    return (*static.values(), *settings), tree, tuple((*aval_of(leaf), _sharding(leaf)) for leaf in leaves)


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
    return sharding if isinstance(sharding, NamedSharding) and sharding.mesh.size > 1 else None


def aval_of(leaf: Any) -> tuple[tuple[int, ...], str, bool]:
    """Shape, dtype and weakness of an argument: what a compiled program demands of it."""
    if isinstance(leaf, (jax.Array, jax.ShapeDtypeStruct, np.ndarray, np.generic)):
        return tuple(leaf.shape), _name(leaf.dtype), bool(getattr(leaf, "weak_type", False))
    aval = jax.typeof(leaf)
    return tuple(aval.shape), _name(aval.dtype), bool(aval.weak_type)


@cache
def _name(dtype: Hashable) -> str:
    """A dtype's name, which NumPy puts together anew each time: a program's call asks for 80 of them."""
    return str(dtype)
