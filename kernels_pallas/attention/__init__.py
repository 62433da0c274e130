"""Causal grouped-query attention over the KV cache."""
