"""The cases that every implementation of an op passes, run by the WGSL kernels in float32."""

import jax.numpy as jnp
import numpy as np
import pytest

from tests.kernels.op_cases import OpCases
from tests.kernels.op_inputs import rng
from tests.wgpu import gpu_work

__all__ = ["rng"]


class TestWgpu(OpCases):
    """Matrix and expert products, and the expert layer. Router, attention and embedding: test_ops.py."""

    dtypes = (jnp.float32,)
    is_traceable = False  # WebGPU keeps every write inside its buffer

    @pytest.fixture(autouse=True)
    def _on_the_gpu(self, gpu):
        self.gpu = gpu
        yield
        gpu(gpu_work.forget)

    def prepare(self, w):
        return self.gpu(gpu_work.keep, w)

    def matmul(self, x, w, dtype):
        return self.gpu(gpu_work.op, "matmul", np.asarray(x), w, decode=len(x) == 1)

    def expert_matmul(self, x, w, ids, dtype):
        return self.gpu(gpu_work.op, "expert_matmul", np.asarray(x), ids, w, decode=len(ids) == 1)

    def moe(self, x, gate, up, down, ids, weights, dtype=jnp.float32):
        return self.gpu(gpu_work.moe, x, (gate, up, down), ids, weights)


def _elsewhere() -> list[str]:
    """Cases of JAX's own arrays and transformations, or that test_ops.py has in a form of its own."""
    parts = ("dequantization", "embedding", "in_tiles_of_rows", "stages", "gradients", "vmap", "router")
    parts += ("attention", "named_implementation")
    return [name for name in dir(OpCases) if name.startswith("test_") and any(p in name for p in parts)]


for _name in _elsewhere():
    setattr(TestWgpu, _name, None)
