"""Writes text: all at once, piece by piece, and as an answer in a conversation."""

import qwen3_moe_jax as q3

model = q3.load()  # the embedded model; or a .gguf file, or a packed checkpoint
print(model.generate("def fib(n):", max_tokens=16, sampling=q3.Sampling(temperature=0)))

for piece in model.stream([{"role": "user", "content": "Write a loop."}], max_tokens=16):
    print(piece, end="", flush=True)
print()
