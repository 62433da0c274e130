"""One decoded token of Qwen3-MoE as a single persistent Pallas:Mosaic GPU kernel.

A block of two warpgroups runs on every multiprocessor and walks through the layers. Blocks wait for one
another at a counter in global memory: a phase waits until the phase before it has signalled. "blocks": every
block signals once; "owners": the blocks that quantize a sequence for all, once per sequence (batches only);
"all": every block once, on a mesh to all devices, whose blocks are then waited for (``exchange``).

    for layer:                                                                    waits for   signals
      norm        h = quantize(rms_norm(x + down parts)), in batches              down        owners
      qkv         qkv = h @ W_qkv                                                 norm        blocks
      attention   q, k = rope(norm(q, k)); cache <- k, v; a = softmax(q K) V      qkv         blocks
      join        a = join(splits), contexts over 128 tokens                      attention   blocks
      output      x += quantize(a) @ W_o + down parts                             join        all
      router      r = rms_norm(x) @ W_router                                      output      blocks
      gate_up     ids, w = top_k(softmax(r)); s = silu(h W_gate[ids]) * h W_up[ids]  router   blocks
      down        down parts = w * (quantize(s) @ W_down[ids])                    gate_up     all
    norm          h = quantize(rms_norm(x + down parts)), in batches              down        owners
    logits        logits = h @ W_lm_head                                          norm        -

A single sequence is normed and quantized by every block for itself: qkv and logits then wait for down.
Every phase begins by issuing the loads of weights that do not depend on earlier phases, and only then waits;
qkv of a single sequence also asks for each warpgroup's first tile of keys and values.
Where all rows are one sequence's, attention writes all keys and values first, then signals and waits again.
All reductions have a fixed order that does not depend on the batch.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from qwen3_moe_jax.kernels_pallas.decode_step.activations import Activations
from qwen3_moe_jax.kernels_pallas.decode_step.attention import Attention
from qwen3_moe_jax.kernels_pallas.decode_step.config import (
    WARPGROUPS,
    Operands,
    Outputs,
    StepConfig,
    output_types,
    scalar_count,
)
from qwen3_moe_jax.kernels_pallas.decode_step.experts import Experts
from qwen3_moe_jax.kernels_pallas.decode_step.grid import Grid
from qwen3_moe_jax.kernels_pallas.decode_step.primitives.layouts import lanes, load
from qwen3_moe_jax.kernels_pallas.decode_step.projections import Projections
from qwen3_moe_jax.kernels_pallas.decode_step.router import Router
from qwen3_moe_jax.kernels_pallas.decode_step.shared_memory import Scratch, scratch_types
from qwen3_moe_jax.kernels_pallas.gpu.interpreter import interpreter_option

EVENTS_PER_LAYER = 64
"""Of a trace."""


class Kernel:
    """The kernel's body: phases in their order."""

    def __init__(self, grid: Grid):
        self.g, self.c = grid, grid.c
        activations = Activations(grid)
        self.projections = Projections(grid, activations)
        self.attention = Attention(grid, activations)
        self.router = Router(grid, activations)
        self.experts = Experts(grid, activations, self.router)

    def run(self) -> None:
        """Decodes a token, unless nobody waits for any sequence's."""
        c, g, shared = self.c, self.g, self.g.shared

        @pl.when(g.wg == 0)
        def _():
            shared.scalars_smem[...] = load(g.inputs.scalars_gmem, lanes(scalar_count(c)))
            g.prim.store_zeros(shared.zeros_smem)

        g.sync_block()
        wanted = g.is_active(0)
        for b in range(1, c.batch):
            wanted |= g.is_active(b)
        pl.when(wanted > 0)(self.token)

    def token(self) -> None:
        """All phases; ``count`` is how often blocks have signalled before the phase."""
        c = self.c
        is_split = (self.attention.plan_splits() > c.batch * c.num_key_value_heads).astype(jnp.int32)
        blocks, owners = c.blocks, c.batch if c.shares else 0
        own = blocks if c.devices == 1 else 0  # signals to this device alone after output and after down

        def layer(i, count):
            self.projections.qkv(i, count, also_ahead=partial(self.attention.prefetch, i))
            count = count + owners + blocks
            self.attention.attend(i, count)
            count = count + c.attention_signals * blocks
            pl.when(is_split > 0)(lambda: self.attention.join(count))
            count = count + is_split * blocks
            self.projections.output(i, count)
            self.router.router(i, count + own)
            self.experts.gate_up(i, count + (own + blocks))
            self.experts.down(i, count + (own + 2 * blocks))
            return count + (2 * own + 2 * blocks)

        count = lax.fori_loop(0, c.num_hidden_layers, layer, jnp.int32(0))
        self.projections.logits(count)
        if self.g.semaphore is not None:
            self.leave_zero(count + owners + blocks)
        elif c.gathers:
            self.g.wait_for_devices(0)

    def leave_zero(self, count: Any) -> None:
        """The last signal; one warpgroup waits for all of them and leaves zero behind."""
        self.g.signal()

        @pl.when((self.g.block == 0) & (self.g.wg == 0))
        def _():
            plgpu.semaphore_wait(self.g.semaphore, count, memory_scope="gpu")
            if self.g.meeting is not None:
                times = jnp.int32(2 * self.c.num_hidden_layers + self.c.gathers)
                self.g.wait_for_devices(times)  # ends in time
                plgpu.semaphore_wait(self.g.meeting, times * (self.c.devices * self.c.blocks))


def decode_step(config: StepConfig, operands: Operands, *, interpret: Any = None) -> Outputs:
    """Runs the kernel.

    Args:
      operands: ``state_gmem``, ``k_cache_gmem`` and ``v_cache_gmem`` are ``jax.Ref``, updated in place.
      interpret: Pallas' interpreter parameters (``emulate`` must be set too).

    Returns:
      The results and buffers.
    """
    outputs = output_types(config)
    leaves, tree = jax.tree.flatten(operands)
    out_leaves, out_tree = jax.tree.flatten(outputs)
    scratch = scratch_types(config)
    folder = config.trace_folder
    profile = {"profile_space": EVENTS_PER_LAYER * config.num_hidden_layers, "profile_dir": folder}

    def body(*refs):
        inputs, refs = refs[: len(leaves)], refs[len(leaves) :]
        written, shared = refs[: len(out_leaves)], refs[len(out_leaves) :]
        inputs, written = jax.tree.unflatten(tree, inputs), jax.tree.unflatten(out_tree, written)
        Kernel(Grid(config, inputs, written, Scratch.of(scratch, shared))).run()

    kernel = plgpu.kernel(
        body,
        out_type=tuple(out_leaves),
        scratch_types=tuple(buffer for buffer in scratch if buffer is not None),
        grid=(config.blocks,),
        grid_names=("sm",),
        num_threads=WARPGROUPS,
        thread_name="wg",
        kernel_name="qwen3_moe_decode_step",
        **interpreter_option(interpret, WARPGROUPS),
        compiler_params=plgpu.CompilerParams(
            **(profile if folder else {}),
            approx_math=True,
            unsafe_no_auto_barriers=True,
            lowering_semantics=plgpu.LoweringSemantics.Lane,  # layouts are given, not searched for
        ),
    )
    return jax.tree.unflatten(out_tree, kernel(*leaves))
