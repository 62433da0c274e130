"""The decode kernel's primitives on Hopper: as from Ampere on, but for the fence of a wait."""

from functools import partial

from qwen3_moe_jax.kernels_pallas.decode_step.primitives.nvidia import *  # noqa: F403 - the names are the body
from qwen3_moe_jax.kernels_pallas.decode_step.primitives.sync import grid_wait as _grid_wait

grid_wait = partial(_grid_wait, fence="fence.acquire.gpu;")
