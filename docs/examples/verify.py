"""Holds the jax backend against the reference, and names the first stage where they part, if they do."""

import numpy as np

import qwen3_moe_jax as q3

prompt = "def fib(n):\n    return"
with q3.load(backend="reference", max_context=64) as reference:
    ids = reference.tokenizer.encode(prompt)
    truth = reference.logits(ids).astype(np.float64)

with q3.load(backend="jax", dtype="float32", max_context=64) as model:
    logits = model.logits(ids).astype(np.float64)
    norms = np.linalg.norm(logits, axis=-1) * np.linalg.norm(truth, axis=-1)
    cosine = ((logits * truth).sum(-1) / norms).min()
    print(f"minimum cosine over {len(ids)} positions: 1 - {1 - cosine:.0e}")
    assert cosine > 1 - 1e-9
    assert model.bisect(prompt) is None  # no stage departs

# The whole contract, on this machine and this file:  model.verify()  or  qwen3-moe verify
