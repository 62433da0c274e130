"""An operation alone: activations times a packed Q4_K matrix of a file, inside ``jit``, without a model."""

import jax
import jax.numpy as jnp
import numpy as np

from qwen3_moe_jax.convert.open_model import open_model
from qwen3_moe_jax.convert.unpack import dequantize
from qwen3_moe_jax.kernels_pallas import quantized_matmul
from qwen3_moe_jax.loader import embedded_model

with open_model(embedded_model()) as source:
    w = source.tensor("layers.0.self_attn.q_proj")  # PackedTensor [N, K]: its type travels with it
print(w)

x = np.random.default_rng(0).normal(size=(4, w.shape[-1])).astype(np.float32)
y = jax.jit(quantized_matmul)(jnp.asarray(x), jax.tree.map(jnp.asarray, w))

truth = x.astype(np.float64) @ dequantize(w).astype(np.float64).T
error = np.abs(y - truth).max() / np.abs(truth).max()
print(f"largest relative error: {error:.0e}")
assert error < 1e-5

# On a Hopper GPU, implementation="hopper" takes weights in layout gpu_tiles, and runs or says why not.
