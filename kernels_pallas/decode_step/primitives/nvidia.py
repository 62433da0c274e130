"""The decode kernel's primitives that all NVIDIA GPUs from Ampere on have alike: products by ``mma``."""

# ruff: noqa: F401 - what is imported are names of the protocol ``names.Primitives``

from qwen3_moe_jax.kernels_pallas.decode_step.primitives.choice import (
    rank_experts,
    sort_pairs,
    top_experts,
    weigh_experts,
)
from qwen3_moe_jax.kernels_pallas.decode_step.primitives.column_operands import (
    load_keys,
    load_queries,
    load_scales,
    load_values,
)
from qwen3_moe_jax.kernels_pallas.decode_step.primitives.columns import (
    as_rounded,
    put_columns,
    put_outputs,
    scores,
    start_outputs,
    store_columns,
    warp_columns,
    weigh,
)
from qwen3_moe_jax.kernels_pallas.decode_step.primitives.loads import (
    load_clamped,
    load_rows,
)
from qwen3_moe_jax.kernels_pallas.decode_step.primitives.products import (
    dot_floats,
    dot_tiles,
    load_fragments,
    look_up,
)
from qwen3_moe_jax.kernels_pallas.decode_step.primitives.sync import (
    block_barrier,
    copy_rows,
    copy_to_shared,
    exchange,
    grid_signal,
    signal_devices,
    wait_devices,
    wait_for_copies,
    warpgroup_barrier,
)
from qwen3_moe_jax.kernels_pallas.decode_step.primitives.warps import (
    View,
    as_new,
    store_lanes,
    store_subblocks,
    store_zeros,
    unset,
    warp_largest,
    warpgroup_reduce,
)
