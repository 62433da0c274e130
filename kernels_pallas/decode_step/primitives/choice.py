"""The choice of experts: top-k with softmax, and pairs in the order of their experts."""

from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm, scf

from qwen3_moe_jax.kernels_pallas.decode_step.primitives.inline import const, equal, lane_and_warp, lane_value
from qwen3_moe_jax.kernels_pallas.decode_step.primitives.layouts import EXPERTS, LOG2E, WARPGROUP


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
        lowest = const(-(2**31))

        def over_warp(value, operation):
            text = f"redux.sync.{operation}.u32 $0, $1, 0xffffffff;"
            return llvm.inline_asm(i32, [value], text, "=r,r", has_side_effects=True)

        def flip(bits):
            """Maps float bits to unsigned integers of the same order; ``unflip`` is the way back."""
            return arith.xori(bits, arith.ori(arith.shrsi(bits, const(31)), lowest))

        def unflip(key):
            return arith.xori(key, arith.ori(arith.shrsi(arith.xori(key, const(-1)), const(31)), lowest))

        lane, warp = lane_and_warp()
        keys, indices = [], []
        for r, register in enumerate(logits.registers.flat):
            for i in range(4):
                logit = arith.mulf(llvm.extractelement(register, const(i)), lane_value(scale))
                keys.append(flip(arith.bitcast(i32, logit)))
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
            best.append(arith.bitcast(f32, unflip(key)))
            chosen.append(winner)
        log2e = arith.constant(f32, LOG2E)
        powers = []
        for value in best:
            shifted = arith.mulf(arith.subf(value, best[0]), log2e)
            powers.append(llvm.inline_asm(f32, [shifted], "ex2.approx.ftz.f32 $0, $1;", "=f,f"))
        total = powers[0]
        for power in powers[1:]:
            total = arith.addf(total, power)
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
