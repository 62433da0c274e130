"""Reads activations and expert choices, and changes a layer's output."""

import numpy as np

import qwen3_moe_jax as q3

model = q3.load(backend="jax", max_context=64)
ids = model.tokenizer.encode("def fib(n):")
seen = model.trace("def fib(n):", ["l_out"]).forward

hidden = seen.stages["l_out", 3]  # float32 [T, D]: what layer 3 hands on
print("norms after layer 3:", np.linalg.norm(hidden, axis=-1).round(1))
print("experts of layer 3, most probable first:\n", seen.expert_ids[3])

doubled = q3.Intervention("l_out", lambda x: 2 * x, layer=3)
plain, changed = model.logits(ids), model.forward(ids, interventions=[doubled]).logits
print("largest change of a logit:", np.abs(changed - plain).max())
