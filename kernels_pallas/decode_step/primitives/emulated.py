"""The decode kernel's primitives as plain ``jnp``, for Pallas' interpreter on a CPU.

The names and meanings are those of ``sm90`` and ``sm80``, whose docstrings hold here too.
"""

import functools
import threading
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import experimental, lax
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


def dot_floats(tiles: list, fragments: list, *, dtype) -> list:
    out = []
    for halves in tiles:
        total: Any = 0
        for words, fragment in zip(halves, fragments, strict=True):
            # by way of uint16: XLA merges the conversion with the one from bytes, and then refuses it
            pairs = jnp.stack(
                [(jnp.concatenate(words, axis=3) >> shift) & 0xFFFF for shift in (0, 16)], axis=-1
            )
            weights = lax.bitcast_convert_type(pairs.astype(jnp.uint16), dtype).astype(jnp.float32)
            weights = weights.reshape(4, 8, 4, 16)
            for part, factor in enumerate((128, 1)):
                x = fragment[:, part::2].sum(axis=1)
                x = jnp.stack(_bytes(x, True), axis=-1).reshape(4, 1, 4, 16)
                total = total + factor * (weights * x).sum(-1)
        out.append(total)
    return out


def look_up(words, table: tuple[int, ...], *, in_order: bool) -> list:
    nibbles = (words[..., None] >> (4 * jnp.arange(8))) & 15
    values: Any = sum(jnp.where(nibbles == i, value & 0xFF, 0) for i, value in enumerate(table))
    if in_order:
        values = values.reshape(*words.shape[:-1], 2, 4, 4)
        parts = [values[..., i, :, :] for i in range(2)]
    else:
        parts = [values[..., i::2] for i in range(2)]
    return [(part << (8 * jnp.arange(4))).sum(-1).astype(jnp.int32) for part in parts]


def load_clamped(ref, first, count: int, layout):
    del layout
    whole = ref[...]
    return whole[jnp.minimum(first + jnp.arange(count), whole.shape[0] - 1)]


def load_rows(ref, tile, superblock, where, *, shared: bool):
    rows = ref[pl.ds(tile * 8, 32 if shared else 8)]
    nbytes = rows.shape[1] * rows.dtype.itemsize
    rows = rows if rows.dtype.itemsize == 1 else lax.bitcast_convert_type(rows, jnp.uint8)
    rows = jnp.broadcast_to(rows.reshape(-1, 8, nbytes), (4, 8, nbytes))
    warps = jnp.zeros(4, jnp.int32) if shared else jnp.arange(4)
    own = jnp.minimum(superblock + warps, nbytes // where.superblock - 1) * where.superblock
    group = jnp.arange(4) // where.sharing * where.group + where.first
    at = own[:, None, None, None] + group[:, None] + jnp.arange(where.count)
    at = jnp.broadcast_to(at, (4, 8, 4, where.count)).reshape(4, 8, -1)
    found = jnp.take_along_axis(rows, at, axis=2).reshape(4, 8, 4, where.count)
    if where.count == 2:
        return lax.bitcast_convert_type(
            found, jnp.float16 if ref.dtype == jnp.float16 else jnp.uint16
        ).astype(jnp.float16 if ref.dtype == jnp.float16 else jnp.int32)
    words = lax.bitcast_convert_type(found.reshape(4, 8, 4, -1, 4), jnp.int32)
    return words if where.count == 16 else words[..., 0]


def as_new(value):
    return value


def unset(shape: tuple[int, ...], dtype, layout):
    del layout
    return jnp.zeros(shape, dtype)


def warpgroup_barrier() -> None:
    """One thread is a warpgroup here."""


def block_barrier(barrier) -> None:
    plgpu.barrier_arrive(barrier)
    plgpu.barrier_wait(barrier)


def grid_signal(semaphore) -> None:
    raise NotImplementedError("the interpreter has no grid barrier: one block alone")


def grid_wait(semaphore, target) -> None:
    raise NotImplementedError("the interpreter has no grid barrier: one block alone")


def signal_devices(semaphore, devices: int) -> None:
    raise NotImplementedError("the interpreter has no semaphores: see exchange")


def wait_devices(semaphore, target) -> None:
    raise NotImplementedError("the interpreter has no semaphores: see exchange")


class _Meeting:
    """Where the threads of simulated devices wait for one another, each with its array."""

    def __init__(self, devices: int):
        self.barrier, self.arrays = threading.Barrier(devices, timeout=MEETING_SECONDS), {}

    def meet(self, device, array) -> np.ndarray:
        """The arrays of all devices, when all are here."""
        self.arrays[int(device)] = np.array(array)
        self.barrier.wait()
        found = np.stack([self.arrays[i] for i in range(self.barrier.parties)])
        self.barrier.wait()  # nobody comes again before all have read
        return found


_meeting = functools.cache(_Meeting)
MEETING_SECONDS = 300
"""Until a simulated device waits no longer for the others, which may still be compiled."""


def exchange(ref, device, sent: list) -> None:
    """Waits for all devices, and takes from each what it has sent, in place of semaphores and remote stores.

    The simulated devices of one process call it equally often (the GPU's kernel signals instead).

    Args:
      ref: an array of which every device has filled its places on its own side.
      device: this device's number.
      sent: of each device, its places on the first axis.
    """
    shape = jax.ShapeDtypeStruct((len(sent), *ref.shape), ref.dtype)
    found = experimental.io_callback(_meeting(len(sent)).meet, shape, device, ref[...])
    for other, places in enumerate(sent):
        for place in places:
            ref[place] = found[other, place]


def top_experts(logits, scale, ids, routing, count: int) -> None:
    best, index = lax.top_k(logits * scale[:, None], count)
    p = jnp.exp2((best - best[:, :1]) * LOG2E)
    ids[...] = index
    routing[...] = p / jnp.sum(p, axis=1, keepdims=True)


def rank_experts(logits, scratch, ids, best, wg) -> None:
    del scratch, wg
    best[...], ids[...] = lax.top_k(logits, ids.shape[0])


def weigh_experts(best, routing) -> None:
    p = jnp.exp2((best[...] - best[0]) * LOG2E)
    routing[...] = p / jnp.sum(p)


def sort_pairs(ids, order) -> None:
    (pairs,) = order.shape
    order[...] = jnp.argsort(ids[...].reshape(-1)[:pairs], stable=True).astype(jnp.int32)


def warpgroup_reduce(arrays: list, layout, operation: str, scratch) -> list:
    del layout, scratch
    return [jnp.sum(x) if operation == "add" else jnp.max(x) for x in arrays]


def load_keys(refs: list, wanted=None):
    del wanted
    return jnp.concatenate([ref[...] for ref in refs])


load_values = load_keys


def load_scales(ref):
    return ref[...]


def load_queries(ref, *, of_bytes: bool):
    del of_bytes
    return ref[...]


def scores(keys, queries, chunks: int, columns: int, dtype, *, of_bytes: bool) -> list:
    del columns, dtype, of_bytes
    s = jnp.dot(keys.astype(jnp.float32), queries.astype(jnp.float32).T, precision=lax.Precision.HIGHEST)
    return jnp.split(s, chunks)


def warp_columns(arrays: list, operation: str):
    joined = jnp.stack(arrays)
    joined = joined.reshape(len(arrays), 4, 16, -1)
    joined = joined.sum((0, 2)) if operation == "add" else joined.max((0, 2))
    return jnp.repeat(joined, 16, axis=0)


def weigh(values, weights: list, out, decay, dtype, *, of_bytes: bool):
    """Row 64 m + 16 w + i is warp w's value 16 m + i."""
    del of_bytes
    columns, size = out.shape[1], values.shape[1]
    p = jnp.stack(weights).astype(dtype).astype(jnp.float32).reshape(-1, 4, 16, columns)
    v = values.astype(jnp.float32).reshape(-1, 4, 16, size // 16, 16)
    added = jnp.einsum("cwtmi,cwtn->mwin", v, p, precision=lax.Precision.HIGHEST)
    return as_rounded(out * jnp.tile(decay, (size // 16, 1))) + added.reshape(out.shape)


def as_rounded(x):
    return lax.optimization_barrier(x)


def start_outputs(ref, wanted, columns: int, *, of_bytes: bool):
    del of_bytes
    own = jnp.where(wanted, jnp.repeat(ref[...][:, None], columns, axis=1), 0.0)
    others = ((0, 0), (0, 3), (0, 0), (0, 0))  # the first warp's alone
    return jnp.pad(own.reshape(-1, 1, 16, columns), others).reshape(-1, columns)


def put_columns(ref, values) -> None:
    ref[...] = values[::16]


def put_outputs(ref, out, factor, group: int, *, of_bytes: bool) -> None:
    del of_bytes
    _, columns, size = ref.shape
    scaled = (out * jnp.tile(factor, (size // 16, 1))).reshape(-1, 4, 16, out.shape[1])
    own = scaled[..., columns * group : columns * (group + 1)]
    ref[...] = own.transpose(1, 3, 0, 2).reshape(ref.shape)


def store_columns(ref, values) -> None:
    ref[...] = values[: ref.shape[0]]


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

    def send(self, index: tuple, value, devices: int) -> None:
        """Into this device's own array: the others take it from there (:func:`exchange`)."""
        del devices
        self.store(index, value)

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


def copy_rows(ref, source) -> None:
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
