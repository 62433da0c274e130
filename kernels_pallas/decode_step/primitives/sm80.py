"""The decode kernel's primitives from Ampere on."""

from functools import partial

from qwen3_moe_jax.kernels_pallas.decode_step.primitives.nvidia import *  # noqa: F403 - the names are the body
from qwen3_moe_jax.kernels_pallas.decode_step.primitives.sync import grid_wait as _grid_wait

grid_wait = partial(_grid_wait, fence="fence.acq_rel.gpu;")
