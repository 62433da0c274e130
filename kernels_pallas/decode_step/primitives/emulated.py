"""The decode kernel's primitives as plain ``jnp``, for Pallas' interpreter on a CPU.

The names and meanings are those of ``sm90`` and ``sm80``, whose docstrings hold here too.
"""

from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from qwen3_moe_jax.kernels_pallas.decode_step.primitives.layouts import LOG2E


def _bytes(word, signed: bool) -> list:
    parts = [(word >> (8 * i)) & 0xFF for i in range(4)]
    return [jnp.where(p > 127, p - 256, p) for p in parts] if signed else parts


def load_fragments(words, zeros, *, shared: bool) -> list:
    del zeros
    w = words[...]
    w = jnp.broadcast_to(w[:, None], (2, 4, *w.shape[1:])) if shared else w
    column, group = jnp.arange(8)[:, None], jnp.arange(4)[None, :]
    own = (column // 2 == group)[None, :, :, None]
    spread = lambda s, h: jnp.stack([w[i % 2, :, :, s, h] for i in range(8)], axis=1)
    return [[jnp.where(own, spread(s, h), 0) for h in range(2)] for s in range(2)]


def dot_tiles(tiles: list, fragments: list, *, signed: bool) -> list:
    out = []
    for words in tiles:
        total: Any = 0
        for part, factor in enumerate((128, 1)):
            for word, fragment in zip(words, fragments, strict=True):
                x = fragment[:, part::2].sum(axis=1)  # a group's words are in one row, zeros elsewhere
                pairs = zip(_bytes(word, signed), _bytes(x[:, None], True), strict=True)
                products: Any = sum(a * b for a, b in pairs)
                total = total + factor * products.sum(-1)
        out.append(total)
    return out


def as_new(value):
    return value


def warpgroup_barrier() -> None:
    """One thread is a warpgroup here."""


def block_barrier(barrier) -> None:
    plgpu.barrier_arrive(barrier)
    plgpu.barrier_wait(barrier)


def grid_signal(semaphore) -> None:
    raise NotImplementedError("the interpreter has no grid barrier: one block alone")


def grid_wait(semaphore, target) -> None:
    raise NotImplementedError("the interpreter has no grid barrier: one block alone")


def top_experts(logits, scale, ids, routing, count: int) -> None:
    best, index = lax.top_k(logits * scale[:, None], count)
    p = jnp.exp2((best - best[:, :1]) * LOG2E)
    ids[...] = index
    routing[...] = p / jnp.sum(p, axis=1, keepdims=True)


def sort_pairs(ids, order) -> None:
    (pairs,) = order.shape
    order[...] = jnp.argsort(ids[...].reshape(-1)[:pairs], stable=True).astype(jnp.int32)


def warpgroup_reduce(arrays: list, layout, operation: str, scratch) -> list:
    del layout, scratch
    return [jnp.sum(x) if operation == "add" else jnp.max(x) for x in arrays]


def store_first_rows(ref, values) -> None:
    ref[...] = values[: ref.shape[0]]


def tile_memory(shape: tuple[int, ...], dtype: Any) -> Any:
    return plgpu.SMEM(shape, dtype)


def publish_tiles() -> None:
    """Stores are seen at once."""


def load_queries(ref):
    q = ref[...]
    return jnp.concatenate([q] * (64 // q.shape[0]))


def matmul(a, ref, columns: int, *, transposed: bool):
    del columns
    b = ref[...].astype(jnp.float32)
    return jnp.dot(a.astype(jnp.float32), b.T if transposed else b, precision=lax.Precision.HIGHEST)


class View:
    """The interpreter reshapes no references: the other axes are read, reshaped and written whole."""

    def __init__(self, ref, shape: tuple[int, ...], *, leading: int):
        self.ref, self.shape, self.leading = ref, shape, leading

    def load(self, index: tuple, layout):
        del layout
        whole, starts, sizes, kept = self._window(index)
        return lax.dynamic_slice(whole, starts, sizes).reshape(kept)

    def store(self, index: tuple, value) -> None:
        whole, starts, sizes, _ = self._window(index)
        whole = lax.dynamic_update_slice(whole, value.reshape(sizes), starts)
        own = index[: self.leading] if self.leading else ...
        self.ref[own] = whole.reshape(self.ref.shape[self.leading :])

    def _window(self, index: tuple):
        """The addressed part of the array in the view's shape, and the window of it that index means."""
        own = index[: self.leading] if self.leading else ...
        shape = self.shape[self.leading :]
        starts, sizes, kept = [], [], []
        index = index[self.leading :]
        for i, size in zip((*index, *[slice(None)] * (len(shape) - len(index))), shape, strict=True):
            if isinstance(i, slice):
                i = pl.ds(0, size)
            if hasattr(i, "start"):
                starts.append(i.start)
                sizes.append(i.size)
                kept.append(i.size)
            else:
                starts.append(i)
                sizes.append(1)
        return self.ref[own].reshape(shape), starts, sizes, kept


def store_subblocks(ref, piece, value) -> None:
    ref[pl.ds(piece * 4, 4)] = value.reshape(4, *ref.shape[1:])


def copy_to_shared(ref, source) -> None:
    ref[...] = source[...]


def wait_for_copies() -> None:
    """Copies are done at once."""


def warp_largest(x, layout):
    del layout
    return jnp.broadcast_to(x.reshape(4, 32).max(axis=1, keepdims=True), (4, 32)).reshape(x.shape)


def store_lanes(refs: list, subblock, warp: int, parts: list, scale, q, layout) -> None:
    del layout
    words, scales, sums = refs
    own = slice(32 * warp, 32 * warp + 32)
    at = (subblock // 8, subblock % 8 // 2, subblock % 2)
    for i, part in enumerate(parts):
        values = (part.reshape(128)[own] & 0xFF).reshape(2, 4, 4)
        words[(i, *at)] = (values << (8 * jnp.arange(4))).sum(axis=-1).astype(jnp.int32)
    scales[at] = scale.reshape(128)[32 * warp]
    sums[at] = q.reshape(128)[own].reshape(2, 16).sum(axis=1)


def store_zeros(ref) -> None:
    ref[...] = jnp.zeros(ref.shape, ref.dtype)
