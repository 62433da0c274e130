"""The grid of blocks: how they wait for one another, share work and reduce."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from qwen3_moe_jax.kernels_pallas.decode_step.config import (
    WARPGROUPS,
    Operands,
    Outputs,
    StepConfig,
    ceil_div,
)
from qwen3_moe_jax.kernels_pallas.decode_step.shared_memory import REDUCE_SITES, Scratch

Array = Any


def carried(n: int, body: Callable, carry: Any) -> Any:
    """``for i in range(n): carry = body(i, carry)``, without a loop when ``n`` is 1."""
    return body(0, carry) if n == 1 else lax.fori_loop(0, n, body, carry)


def fori(n: Any, body: Callable) -> None:
    """``for i in range(n): body(i)``, without a loop when ``n`` is the Python number 0 or 1."""
    if isinstance(n, int) and n <= 1:
        for i in range(n):
            body(i)
        return
    lax.fori_loop(0, n, lambda i, _: (body(i), None)[1], None)


def stream(
    items: int,
    load: Callable,
    multiply: Callable,
    tiles: tuple,
    *,
    together: int = 1,
    index: Any = None,
    is_last: bool = False,
) -> tuple:
    """``multiply(i, tiles)`` of items i, i + 1, ..., ``together`` at a time, for all items.

    A loop and not straight code: a layer's instructions have to fit the instruction cache.
    Each of the loop's registers is refilled where it was used: moving a register whose load
    is in flight would wait for the load.

    Args:
      load: ``load(i)`` makes the tiles after the first.
      tiles: the first tiles, loaded; their number divides ``items``.
      is_last: nobody needs the tiles that the last turn would load: it loads none.
      index: ``index(group, j)`` stands for the j-th item of a group of as many, in place of a number.

    Returns:
      The tiles that were loaded ahead.
    """
    depth = len(tiles)
    index = index or (lambda group, j: group * depth + j)
    if items == depth:

        def rotate(i, tiles):
            multiply(index(0, i * together), tiles[:together])
            return (*tiles[together:], *tiles[:together])

        return lax.fori_loop(0, items // together, rotate, tiles)

    def several(group, tiles, *, loads=True):
        tiles = list(tiles)
        for j in range(0, depth, together):
            multiply(index(group, j), tiles[j : j + together])
            for k in range(j, j + together) if loads else ():
                tiles[k] = load(index(group + 1, k))
        return tuple(tiles)

    groups = items // depth
    if not is_last:
        return lax.fori_loop(0, groups, several, tiles)
    return several(groups - 1, carried(groups - 1, several, tiles), loads=False)


class Grid:
    """This warpgroup's position among the blocks, and the barriers.

    Attributes:
      c: the configuration; prim: its primitives.
      inputs, outputs, shared: the kernel's references.
      block, wg: this block and warpgroup, int32, new in each phase (:meth:`begin`).
      semaphore: counts the signals since the kernel began; None with one block (the interpreter).
      meeting: counts the signals of all devices; None with one device, or one block.
    """

    def __init__(self, config: StepConfig, inputs: Operands, outputs: Outputs, shared: Scratch):
        self.c, self.prim = config, config.prim
        self.inputs, self.outputs, self.shared = inputs, outputs, shared
        self.begin()
        semaphore = lambda needed: pl.get_global(plgpu.SemaphoreType.REGULAR) if needed else None
        self.semaphore = semaphore(config.blocks > 1)
        self.meeting = semaphore(config.blocks > 1 and config.devices > 1)

    def begin(self) -> None:
        """Begins a phase: this block and warpgroup, as numbers that the compiler has to take as new.

        Otherwise it computes the addresses of all phases, some 250, before the loop over layers, and keeps
        them in registers that the phases need, or in memory (docs/design/decode-kernel.md has the figures).
        """
        self.block, self.wg = (self.prim.as_new(lax.axis_index(name)) for name in ("sm", "wg"))

    @property
    def device(self) -> Array:
        """This device's number among those that decode together, int32."""
        return self.shared.scalars_smem[self.c.num_hidden_layers * len(self.c.columns()) + 2 * self.c.batch]

    # What the scalars say

    def table(self, layer: Array, name: str) -> Array:
        """An entry of the table of where a layer's weights lie, int32."""
        columns = self.c.columns()
        return self.shared.scalars_smem[layer * len(columns) + columns[name]]

    def position(self, b: Array) -> Array:
        """Tokens that sequence b has in the cache, int32."""
        return self.shared.scalars_smem[self.c.num_hidden_layers * len(self.c.columns()) + b]

    def is_active(self, b: Array) -> Array:
        """1 where sequence b's results are wanted."""
        return self.shared.scalars_smem[self.c.num_hidden_layers * len(self.c.columns()) + self.c.batch + b]

    # Barriers

    def signal(self, *, by_first: bool = False, to_all: bool = False) -> None:
        """Ends a phase: the block's results are written.

        Args:
          by_first: by the first warpgroup alone.
          to_all: results are for all devices, and so is the signal.
        """
        if not by_first:
            self.sync_block()

        @pl.when(self.wg == 0)
        def _():
            if to_all and self.meeting is not None:
                self.prim.signal_devices(self.meeting, self.c.devices)
            elif self.semaphore is not None:
                self.prim.grid_signal(self.semaphore)

    @jax.named_scope("wait")
    def wait(self, count: Array) -> None:
        """Waits until blocks have signalled ``count`` times in all."""
        if self.semaphore is None:
            self.sync_block()
        else:
            self.prim.grid_wait(self.semaphore, count)

    def wait_for_output(self, layer: Array, count: Array) -> None:
        """Waits for the output projection of a layer: of all devices, or ``count`` on one device."""
        if self.c.devices == 1:
            self.wait(count)
        else:
            self.wait_for_devices(2 * layer + 1)

    def wait_for_down(self, layer: Array, count: Array) -> None:
        """Likewise for down of the layer before this one."""
        if self.c.devices == 1:
            self.wait(count)
        else:
            self.wait_for_devices(2 * layer)

    @jax.named_scope("wait_for_devices")
    def wait_for_devices(self, times: Array) -> None:
        """Waits until every block of all devices has signalled so often to all."""
        if self.meeting is not None:
            self.prim.wait_devices(self.meeting, times * (self.c.devices * self.c.blocks))
            return
        self.sync_block()

        @pl.when(self.wg == 0)
        def _():
            self.prim.exchange(self.inputs.state_gmem, self.device, self.c.slots.sent)
            if self.c.gathers:
                each = [[device] for device in range(self.c.devices)]
                self.prim.exchange(self.outputs.logits_gmem, self.device, each)

        self.sync_block()

    def sync_block(self) -> None:
        """Waits for both warpgroups."""
        self.prim.block_barrier(self.shared.barrier)

    def sync_warpgroup(self) -> None:
        """Waits for the four warps."""
        self.prim.warpgroup_barrier()

    def totals(self, values: list, layout: Any, operation: str, site: str, turn: Array) -> list:
        """The sum or maximum ("add", "max") of each of at most ``2 * MAX_NORMED`` arrays, in every lane.

        One barrier serves them all. ``site`` is the caller, ``turn`` how often it did.
        """
        scratch = self.shared.reduce_smem.at[self.wg, REDUCE_SITES.index(site), turn % 2]
        return self.prim.warpgroup_reduce(values, layout, operation, scratch)

    # Who does what

    def for_batch(self, body: Callable) -> None:
        """``body(b)`` for every sequence."""
        fori(self.c.batch, body)

    def for_groups(self, together: int, body: Callable) -> None:
        """``body(number, first, size)`` for groups of sequences, whose loads a body issues at once."""
        together = min(together, self.c.batch)
        whole, rest = divmod(self.c.batch, together)
        fori(whole, lambda i: body(i, i * together, together))
        if rest:
            body(whole, whole * together, rest)

    def for_own(self, first: Array, size: int, body: Callable) -> None:
        """Runs ``body(b)`` for that of the sequences from ``first`` on that this block quantizes for all."""
        c = self.c
        if c.blocks < c.batch:
            fori(size, lambda i: body(first + i))
            return
        each = c.blocks // c.batch
        b = self.block // each
        pl.when((self.block % each == 0) & (b >= first) & (b < first + size))(lambda: body(b))

    def for_my_batch(self, body: Callable) -> None:
        """Runs ``body(i, b)`` for this warpgroup's i-th sequence b: every second one."""
        for i in range(ceil_div(self.c.batch, WARPGROUPS)):
            b = i * WARPGROUPS + self.wg
            if (i + 1) * WARPGROUPS <= self.c.batch:
                body(i, b)
            else:
                pl.when(b < self.c.batch)(partial(body, i, b))


def one_type(types: tuple, selector: Array, body: Callable) -> None:
    """Runs ``body(index)`` for the type of this layer."""
    if len(types) == 1:
        body(0)
        return
    for i in range(len(types)):
        pl.when(selector == i)(partial(body, i))


class Phases:
    """What the phases' classes have in common: the grid, and short names for what it holds.

    Attributes:
      g: the grid; c: the configuration; prim: the primitives.
    """

    def __init__(self, grid: Grid):
        self.g, self.c, self.prim = grid, grid.c, grid.prim
        self.inputs, self.outputs, self.shared = grid.inputs, grid.outputs, grid.shared
