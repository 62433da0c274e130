"""Ops on packed arrays, used inside ``jit``: what each means in plain jnp, and its fast kernels.

Importing the package registers ``PackedTensor`` as a JAX pytree. Every op takes
``implementation=None | "xla" | "hopper" | "portable" | "native"``: None may fall back to what runs
here, a named one runs or raises ``NotImplementedError``. Three ops are kernels alone:
``all_layers`` (a CPU's), ``decode_layers``, and ``decode_step.api.decode_step``, whose import needs Mosaic
GPU.
"""

from qwen3_moe_jax.kernels_pallas.packed import pytree

pytree.register()

from qwen3_moe_jax.kernels_pallas.all_layers.api import Layers, all_layers  # noqa: E402
from qwen3_moe_jax.kernels_pallas.attention.api import CACHE_TILE, attention  # noqa: E402
from qwen3_moe_jax.kernels_pallas.decode_layers.api import decode_layers  # noqa: E402
from qwen3_moe_jax.kernels_pallas.embedding_lookup.api import embedding_lookup  # noqa: E402
from qwen3_moe_jax.kernels_pallas.expert_matmul.api import expert_matmul  # noqa: E402
from qwen3_moe_jax.kernels_pallas.moe_mlp.api import moe_mlp  # noqa: E402
from qwen3_moe_jax.kernels_pallas.norm_rope.api import rms_norm, rope, rope_tables  # noqa: E402
from qwen3_moe_jax.kernels_pallas.packed.dequantize import dequantize  # noqa: E402
from qwen3_moe_jax.kernels_pallas.packed.stacks import LayerTable, Matrices, OneOf  # noqa: E402
from qwen3_moe_jax.kernels_pallas.quantized_matmul.api import quantized_matmul  # noqa: E402
from qwen3_moe_jax.kernels_pallas.router.api import Routing, choose_experts, router  # noqa: E402
from qwen3_moe_jax.kernels_pallas.top_k.api import top_k  # noqa: E402

__all__ = [
    "CACHE_TILE",
    "LayerTable",
    "Layers",
    "Matrices",
    "OneOf",
    "Routing",
    "all_layers",
    "attention",
    "choose_experts",
    "decode_layers",
    "dequantize",
    "embedding_lookup",
    "expert_matmul",
    "moe_mlp",
    "quantized_matmul",
    "rms_norm",
    "rope",
    "rope_tables",
    "router",
    "top_k",
]
