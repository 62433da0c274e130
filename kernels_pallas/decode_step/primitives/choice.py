"""The choice of experts: top-k with softmax, and pairs in the order of their experts."""

from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm, nvvm, scf

from qwen3_moe_jax.kernels_pallas.decode_step.primitives.inline import const, equal, lane_and_warp, lane_value
from qwen3_moe_jax.kernels_pallas.decode_step.primitives.layouts import (
    EXPERTS,
    LOG2E,
    RANK_WORDS,
    RANKED,
    SCALAR,
    WARPGROUP,
    lanes,
)


def top_experts(logits, scale, ids, routing, count: int) -> None:
    """The ``count`` largest of each row of logits times its scale, and their softmax, one row per warp.

    Equal logits are ordered by index. The exponentials are of differences to the largest and
    their sum runs from the largest down, so a row's result depends on that row alone.

    Args:
      logits: float32 [4, n] of layout ``EXPERTS``.
      scale: float32 [4], above zero, of that layout without its second axis.
      ids, routing: int32 and float32 [4, count] in shared memory, to be written.
    """

    @plgpu.inline_mgpu(arg_types=(EXPERTS, EXPERTS.reduce(1), plgpu.RefType(), plgpu.RefType()))
    def choose(ctx, logits, scale, ids, routing):
        del ctx
        i32, f32 = ir.IntegerType.get_signless(32), ir.F32Type.get()

        def over_warp(value, operation):
            text = f"redux.sync.{operation}.u32 $0, $1, 0xffffffff;"
            return llvm.inline_asm(i32, [value], text, "=r,r", has_side_effects=True)

        lane, warp = lane_and_warp()
        keys, indices = [], []
        for r, register in enumerate(logits.registers.flat):
            for i in range(4):
                logit = arith.mulf(llvm.extractelement(register, const(i)), lane_value(scale))
                keys.append(_ordered_bits(arith.bitcast(i32, logit)))
                indices.append(arith.addi(arith.muli(lane, const(4)), const(r * 128 + i)))

        def tree(join, values):
            while len(values) > 1:
                paired = [join(a, b) for a, b in zip(values[::2], values[1::2], strict=False)]
                values = paired + values[len(values) // 2 * 2 :]
            return values[0]

        best, chosen = [], []
        for _ in range(count):
            key = over_warp(tree(arith.maxui, keys), "max")
            is_best = [equal(k, key) for k in keys]
            tied = [arith.select(e, i, const(-1)) for e, i in zip(is_best, indices, strict=True)]
            winner = over_warp(tree(arith.minui, tied), "min")
            same = [equal(i, winner) for i in indices]
            keys = [arith.select(e, const(0), k) for e, k in zip(same, keys, strict=True)]
            best.append(arith.bitcast(f32, _float_bits(key)))
            chosen.append(winner)
        powers = _powers(best)
        total = _sum(powers)
        id_base, routing_base = mgpu.utils.memref_ptr(ids), mgpu.utils.memref_ptr(routing)
        branch = scf.IfOp(equal(lane, const(0)))
        with ir.InsertionPoint(branch.then_block):
            for i, (winner, power) in enumerate(zip(chosen, powers, strict=True)):
                at = arith.addi(arith.muli(warp, const(count)), const(i))
                llvm.store(winner, mgpu.utils.getelementptr(id_base, [at], i32))
                weight = arith.divf(power, total)
                llvm.store(weight, mgpu.utils.getelementptr(routing_base, [at], f32))
            scf.yield_([])

    choose(logits, scale, ids, routing)


def rank_experts(logits, scratch, ids, best, wg) -> None:
    """The largest of one row of logits, in their order; run by both warpgroups, each with half of the rows.

    Each lane counts how many of 64 logits go before its expert's; two lanes are an expert. In place of the
    chain of maxima of :func:`top_experts`, with the same result.

    Args:
      logits: float32 [RANKED] of layout ``lanes(RANKED)``, the same in both warpgroups.
      scratch: int32 [RANK_WORDS] of this warpgroup, in shared memory.
      ids, best: int32 and float32 [count] in shared memory, to be written: experts and their logits.
      wg: this warpgroup.
    """
    (count,), layout = ids.shape, lanes(RANKED)

    @plgpu.inline_mgpu(arg_types=(layout, *[plgpu.RefType()] * 3, SCALAR))
    def rank(ctx, logits, scratch, ids, best, wg):
        del ctx
        i32, i64, f32 = (*(ir.IntegerType.get_signless(n) for n in (32, 64)), ir.F32Type.get())
        vector = ir.VectorType.get((4,), i32)
        base = mgpu.utils.memref_ptr(scratch)
        word = lambda at: mgpu.utils.getelementptr(base, [at], i32)
        thread = arith.remui(mgpu.utils.thread_idx(), const(WARPGROUP))
        place = lambda expert: arith.addi(expert, arith.shli(arith.shrui(expert, const(6)), const(2)))
        llvm.store(_ordered_bits(arith.bitcast(i32, lane_value(logits))), word(place(thread)))
        mgpu.utils.warpgroup_barrier()
        half = arith.andi(thread, const(1))
        expert = arith.addi(arith.shli(wg.registers.item(), const(6)), arith.shrui(thread, const(1)))
        mine = llvm.load(i32, word(place(expert)))
        wide = lambda high, low: arith.ori(
            arith.shli(arith.extui(i64, high), arith.constant(i64, 32)), arith.extui(i64, low)
        )
        # Of equal logits the first goes first: the words below are larger for an earlier expert.
        own = wide(mine, arith.subi(arith.addi(const(RANKED), arith.shli(half, const(6))), expert))
        first, ranks = arith.muli(half, const(RANK_WORDS // 2 + 2)), [const(0)] * 4
        for start in range(0, RANKED // 2, 4):
            four = llvm.load(vector, word(arith.addi(first, const(start))), alignment=16)
            for i in range(4):
                other = wide(llvm.extractelement(four, const(i)), const(RANKED - start - i))
                before = arith.cmpi(arith.CmpIPredicate.ugt, other, own)
                ranks[i] = arith.addi(ranks[i], arith.extui(i32, before))
        rank = arith.addi(arith.addi(ranks[0], ranks[1]), arith.addi(ranks[2], ranks[3]))
        there = nvvm.shfl_sync(const(-1), rank, const(1), const(31), nvvm.ShflKind.bfly)
        rank = arith.addi(rank, there)
        is_chosen = arith.cmpi(arith.CmpIPredicate.ult, rank, const(count))
        branch = scf.IfOp(arith.andi(is_chosen, equal(half, const(0))))
        with ir.InsertionPoint(branch.then_block):
            llvm.store(expert, mgpu.utils.getelementptr(mgpu.utils.memref_ptr(ids), [rank], i32))
            logit = arith.bitcast(f32, _float_bits(mine))
            llvm.store(logit, mgpu.utils.getelementptr(mgpu.utils.memref_ptr(best), [rank], f32))
            scf.yield_([])

    rank(logits, scratch, ids, best, wg)


def weigh_experts(best, routing) -> None:
    """The softmax of logits in their order, as :func:`top_experts` has it; run by a whole warpgroup.

    Args:
      best, routing: float32 [count] in shared memory.
    """
    (count,) = best.shape

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), plgpu.RefType()))
    def weigh(ctx, best, routing):
        del ctx
        f32 = ir.F32Type.get()
        at = lambda ref, i: mgpu.utils.getelementptr(mgpu.utils.memref_ptr(ref), [const(i)], f32)
        thread = arith.remui(mgpu.utils.thread_idx(), const(WARPGROUP))
        branch = scf.IfOp(equal(thread, const(0)))
        with ir.InsertionPoint(branch.then_block):
            powers = _powers([llvm.load(f32, at(best, i)) for i in range(count)])
            total = _sum(powers)
            for i, power in enumerate(powers):
                llvm.store(arith.divf(power, total), at(routing, i))
            scf.yield_([])

    weigh(best, routing)


def _ordered_bits(bits: ir.Value) -> ir.Value:
    """Maps float bits to unsigned integers of the same order; :func:`_float_bits` is the way back."""
    return arith.xori(bits, arith.ori(arith.shrsi(bits, const(31)), const(-(2**31))))


def _float_bits(key: ir.Value) -> ir.Value:
    return arith.xori(key, arith.ori(arith.shrsi(arith.xori(key, const(-1)), const(31)), const(-(2**31))))


def _powers(best: list) -> list:
    """The exponentials of values' differences to the first."""
    f32 = ir.F32Type.get()
    log2e = arith.constant(f32, LOG2E)
    shifted = [arith.mulf(arith.subf(value, best[0]), log2e) for value in best]
    return [llvm.inline_asm(f32, [x], "ex2.approx.ftz.f32 $0, $1;", "=f,f") for x in shifted]


def _sum(values: list) -> ir.Value:
    """From the first value on."""
    total = values[0]
    for value in values[1:]:
        total = arith.addf(total, value)
    return total


def sort_pairs(ids, order) -> None:
    """Numbers of pairs (a sequence and one of its experts) in the order of their experts.

    Args:
      ids: int32 [sequences, experts per token] in shared memory, at least as many as pairs.
      order: int32 [pairs] in shared memory, to be written; at most 128.
    """
    (pairs,) = order.shape

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), plgpu.RefType()))
    def sort(ctx, ids, order):
        del ctx
        i32 = ir.IntegerType.get_signless(32)
        vector = ir.VectorType.get((4,), i32)
        base, out = mgpu.utils.memref_ptr(ids), mgpu.utils.memref_ptr(order)
        own = arith.remui(mgpu.utils.thread_idx(), const(WARPGROUP))
        inside = arith.cmpi(arith.CmpIPredicate.ult, own, const(pairs))
        branch = scf.IfOp(inside)
        with ir.InsertionPoint(branch.then_block):
            key = lambda expert, pair: arith.addi(arith.shli(expert, const(7)), pair)
            mine = key(llvm.load(i32, mgpu.utils.getelementptr(base, [own], i32)), own)
            ranks = [const(0)] * 4
            for first in range(0, pairs, 4):
                four = llvm.load(vector, mgpu.utils.getelementptr(base, [const(first)], i32), alignment=16)
                for i in range(4):
                    other = key(llvm.extractelement(four, const(i)), const(first + i))
                    less = arith.cmpi(arith.CmpIPredicate.ult, other, mine)
                    ranks[i] = arith.addi(ranks[i], arith.extui(i32, less))
            rank = arith.addi(arith.addi(ranks[0], ranks[1]), arith.addi(ranks[2], ranks[3]))
            llvm.store(own, mgpu.utils.getelementptr(out, [rank], i32))
            scf.yield_([])

    sort(ids, order)
