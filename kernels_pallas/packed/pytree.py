"""Makes `PackedTensor` a JAX pytree: packed weights go through jit, vmap and grad.

``convert`` stays free of JAX, so the registration lives here; importing
``kernels_pallas`` does it once. The arrays are the leaves, under their names;
type, layout and the set of names are static.
"""

from typing import Any

import jax
import jax.numpy as jnp

from qwen3_moe_jax.convert.packed import PackedTensor


def _flatten_with_keys(w: PackedTensor) -> tuple[list[tuple[Any, Any]], tuple[Any, ...]]:
    names = tuple(sorted(w.arrays))
    return [(jax.tree_util.DictKey(n), w.arrays[n]) for n in names], (names, w.type, w.layout)


def _flatten(w: PackedTensor) -> tuple[list[Any], tuple[Any, ...]]:
    names = tuple(sorted(w.arrays))
    return [w.arrays[n] for n in names], (names, w.type, w.layout)


def _unflatten(static: tuple[Any, ...], leaves: Any) -> PackedTensor:
    names, type_, layout = static
    return PackedTensor(dict(zip(names, leaves, strict=True)), type_, layout)


def register() -> None:
    """Registers the class; a second call is an error in JAX, so the package calls it once."""
    jax.tree_util.register_pytree_with_keys(PackedTensor, _flatten_with_keys, _unflatten, _flatten)


def to_device(w: PackedTensor) -> PackedTensor:
    """The same tensor with JAX arrays (NumPy arrays cannot be indexed by traced values)."""
    return jax.tree_util.tree_map(jnp.asarray, w)
