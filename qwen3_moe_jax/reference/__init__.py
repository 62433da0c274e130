"""The reference backend: the whole forward pass in NumPy, slow and obvious."""

from qwen3_moe_jax.reference.model import ReferenceRunner

__all__ = ["ReferenceRunner"]
