"""Answers several prompts at once; each answer is the one that its prompt gets alone."""

import qwen3_moe_jax as q3

prompts = ["def f(", "class A:", "import ", "for i in"]
with q3.load(max_context=128) as model:
    greedy = q3.Sampling(temperature=0)
    answers = model.generate_batch(prompts, max_tokens=12, sampling=greedy)
    for prompt, answer in zip(prompts, answers, strict=True):
        print(f"{prompt!r}: {answer.text!r} ({answer.finish_reason})")
    assert answers[0].text == model.generate(prompts[0], max_tokens=12, sampling=greedy)
