"""What attention's products take: a lane's keys, values and queries, as ``columns`` multiplies them."""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm, scf

from qwen3_moe_jax.kernels_pallas.decode_step.primitives.inline import const, equal, lane_and_warp
from qwen3_moe_jax.kernels_pallas.decode_step.primitives.layouts import CHUNK, SCALAR, WARPGROUP, lanes
from qwen3_moe_jax.kernels_pallas.decode_step.primitives.sync import row_bytes

LAYOUT = plgpu.Layout.WGMMA
ROW = LAYOUT.reduce(1)
Array = Any


def signless(bits: int) -> ir.Type:
    return ir.IntegerType.get_signless(bits)


def _registers(n: int) -> plgpu.ShapeDtypeStruct:
    """n words of each lane, whatever they are."""
    return plgpu.ShapeDtypeStruct((n * WARPGROUP,), jnp.int32, layout=lanes(n * WARPGROUP))


def packed(words: list) -> mgpu.FragmentedArray:
    """A lane's words as an array."""
    layout = lanes(len(words) * WARPGROUP).to_mgpu()
    registers = np.full((len(words),), None, object)
    empty = llvm.mlir_undef(ir.VectorType.get((1,), signless(32)))
    registers[:] = [llvm.insertelement(empty, word, const(0)) for word in words]
    return mgpu.FragmentedArray(_registers=registers, _layout=layout, _is_signed=True)


def words_of(array: mgpu.FragmentedArray) -> list:
    return [llvm.extractelement(register, const(0)) for register in array.registers.flat]


def in_layout(layout: Any, shape: tuple[int, ...], registers: Any) -> mgpu.FragmentedArray:
    layout = layout.to_mgpu()
    own = np.full(layout.registers_shape(shape), None, object)
    for at, register in zip(np.ndindex(own.shape), registers, strict=True):
        own[at] = register
    return mgpu.FragmentedArray(_registers=own, _layout=layout, _is_signed=None)


def place() -> tuple:
    """This lane's r and q, and its warp."""
    lane, warp = lane_and_warp()
    return arith.divui(lane, const(4)), arith.remui(lane, const(4)), warp


def added(*values: ir.Value) -> ir.Value:
    total = values[0]
    for value in values[1:]:
        total = arith.addi(total, value)
    return total


def times(value: ir.Value, factor: int) -> ir.Value:
    return arith.muli(value, const(factor))


def base_of(ref: ir.Value) -> ir.Value:
    """The address of a reference; of global memory as such."""
    pointer = mgpu.utils.memref_ptr(ref)
    if llvm.PointerType(pointer.type).address_space == 0:
        pointer = llvm.addrspacecast(llvm.PointerType.get(1), pointer)
    return pointer


def _load_words(base: ir.Value, offset: ir.Value, nbytes: int) -> list:
    """``nbytes``, 8 or 16, at a byte offset."""
    pointer = mgpu.utils.getelementptr(base, [offset], signless(8))
    value = llvm.load(ir.VectorType.get((nbytes // 4,), signless(32)), pointer, alignment=nbytes)
    return [llvm.extractelement(value, const(i)) for i in range(nbytes // 4)]


def _load(words: Callable, refs: list, wanted: Array | None, count: int) -> Array:
    """A lane's ``count`` words of ``refs``, if they are wanted."""
    flags = [] if wanted is None else [wanted.astype(jnp.int32)]

    @plgpu.inline_mgpu(
        arg_types=([plgpu.RefType()] * len(refs), [SCALAR] * len(flags)), return_type=_registers(count)
    )
    def load(ctx, refs, flags):
        del ctx
        if not flags:
            return packed(words(refs))
        branch = scf.IfOp(equal(flags[0].registers.item(), const(1)), [signless(32)] * count, has_else=True)
        with ir.InsertionPoint(branch.then_block):
            scf.yield_(words(refs))
        assert branch.else_block is not None
        with ir.InsertionPoint(branch.else_block):
            scf.yield_([llvm.mlir_undef(signless(32))] * count)
        return packed(list(branch.results))

    return load(list(refs), flags)


def load_keys(refs: list, wanted: Array | None = None) -> Array:
    """Keys as :func:`scores` takes them: of rows r and r + 8 of its warp's 16 a lane has pieces q, q + 4, ...

    Args:
      refs: [64, head_dim] each, of 16 bits or int8, in global or shared memory; rows at any distance.
      wanted: whether, bool; without, they are loaded. What is not wanted is anything.
    """
    pieces = refs[0].shape[1] * refs[0].dtype.itemsize // 64

    def load(refs):
        (r, q, warp), words = place(), []
        for ref in refs:
            base, stride = base_of(ref), row_bytes(ref)
            first = added(times(added(times(warp, 16), r), stride), times(q, 16))
            for half in range(2):
                for i in range(pieces):
                    words += _load_words(base, added(first, const(8 * half * stride + 64 * i)), 16)
        return words

    return _load(load, refs, wanted, len(refs) * 8 * pieces)


def load_values(refs: list, wanted: Array | None = None) -> Array:
    """Values as :func:`weigh` takes them: of tokens 2 q, 2 q + 1, 2 q + 8 and 2 q + 9 pieces r, r + 8, ...

    Args:
      refs, wanted: as of :func:`load_keys`.
    """
    row = refs[0].shape[1] * refs[0].dtype.itemsize
    nbytes = min(16, row // 8)
    count = len(refs) * row // 8

    def load(refs):
        (r, q, warp), words = place(), []
        for ref in refs:
            base, stride = base_of(ref), row_bytes(ref)
            first = added(times(added(times(warp, 16), times(q, 2)), stride), times(r, nbytes))
            for token in (0, 1, 8, 9):
                for i in range(row // (8 * nbytes)):
                    at = added(first, const(token * stride + 8 * nbytes * i))
                    words += _load_words(base, at, nbytes)
        return words

    return _load(load, refs, wanted, count)


def load_scales(ref: Any) -> Array:
    """float32 [64] of layout WGMMA without its second axis; ``ref``: in global memory, at any distance."""
    shape = (CHUNK,)

    @plgpu.inline_mgpu(
        arg_types=(plgpu.RefType(),), return_type=plgpu.ShapeDtypeStruct(shape, jnp.float32, layout=ROW)
    )
    def load(ctx, ref):
        del ctx
        r, _, warp = place()
        base, stride = base_of(ref), row_bytes(ref)
        first = times(added(times(warp, 16), r), stride)
        vector = ir.VectorType.get((1,), ir.F32Type.get())
        at = lambda half: mgpu.utils.getelementptr(
            base, [added(first, const(8 * half * stride))], signless(8)
        )
        return in_layout(ROW, shape, [llvm.load(vector, at(half), alignment=4) for half in range(2)])

    return load(ref)


def load_queries(ref: Any, *, of_bytes: bool) -> Array:
    """Queries as :func:`scores` takes them.

    Args:
      ref: [columns, head_dim] of 16 bits in shared memory; rows at any distance.
      of_bytes: keys are int8.
    """
    columns, size = ref.shape
    pieces = 2 if of_bytes else 1  # of 16 bytes, beside one another

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(),), return_type=_registers(columns * size // 64))
    def load(ctx, ref):
        del ctx
        (r, q, _), words = place(), []
        base, stride = base_of(ref), row_bytes(ref)
        first = added(times(r, stride), times(q, 16 * pieces))
        for g in range(columns // 8):
            for i in range(size // (32 * pieces)):
                for piece in range(pieces):
                    at = 8 * g * stride + 64 * pieces * i + 16 * piece
                    words += _load_words(base, added(first, const(at)), 16)
        return packed(words)

    return load(ref)
