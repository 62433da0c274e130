"""An implementation of the ops as the cases call it."""

import jax
import jax.numpy as jnp
import numpy as np

import qwen3_moe_jax.kernels_pallas as ops
from qwen3_moe_jax.convert.layouts import lanes16 as layouts
from qwen3_moe_jax.convert.packed import ROWS, PackedTensor
from tests import tolerances
from tests.kernels.op_inputs import DTYPES
from tests.kernels.op_oracles import CANARY, CANARY_ROWS, check_canaries, write_between


class OpUnderTest:
    """What cases run on, and how; a subclass says which implementation."""

    implementation: str | None = None
    layout: str = ROWS
    dtypes = DTYPES
    shape_dtypes = (jnp.float32,)
    """Dtypes of the cases of every shape; ``dtypes`` are those of heavy tails, routing and real shapes."""
    is_traceable = True
    """Whether the ops run under ``jax.jit``, and so write between canary rows."""

    def prepare(self, w: PackedTensor) -> PackedTensor:
        """The tensor as this implementation takes it; rows where it has no other layout for the shape."""
        possible = layouts.supports(self.layout, w.type, w.shape)
        return jax.tree_util.tree_map(jnp.asarray, layouts.to_layout(w, self.layout if possible else ROWS))

    def bound(self, dtype, float32: float, bfloat16: float) -> float:
        return float32 if dtype == jnp.float32 else bfloat16

    def matmul_bound(self, dtype) -> float:
        return self.bound(dtype, tolerances.MATMUL_FLOAT32_NMSE, tolerances.MATMUL_BFLOAT16_NMSE)

    def matmul(self, x, w: PackedTensor, dtype) -> jax.Array:
        return ops.quantized_matmul(x, w, compute_dtype=dtype, implementation=self.implementation)

    def between_canaries(self, op, shape: tuple[int, ...], *arrays, dtype) -> np.ndarray:
        """``op(*arrays, dtype)``, whose result has this shape, written between canary rows."""
        if not self.is_traceable:
            return np.asarray(op(*arrays, dtype))
        buffer = jnp.full((shape[0] + 2 * CANARY_ROWS, *shape[1:]), CANARY)
        return check_canaries(np.asarray(write_between(op, dtype, buffer, *arrays)))
