"""How much of prompts a mixed step reads: steps of known cost, no clock."""

import pytest

from qwen3_moe_jax.serve.engine.pace import PROMPT_TOKENS, Pace


def run(pace, cost, steps):
    """What each step was to read."""
    amounts = []
    for _ in range(steps):
        amounts.append(pace.prompt_tokens(is_decoding=True))
        pace.took(amounts[-1], cost(amounts[-1]))
    return amounts


def test_with_nobody_to_hold_up_all_is_read():
    assert Pace(0.05).prompt_tokens(is_decoding=False) == PROMPT_TOKENS[-1]


def test_a_steps_own_cost_is_not_that_of_its_tokens():
    """12 ms and 16 us per token: 2,048 tokens take 45 ms, and seconds per token of 1,024 would say 57."""
    amounts = run(Pace(0.05), lambda n: 0.012 + 16e-6 * n, 20)
    assert amounts[:5] == [128, 256, 512, 1024, 2048]
    assert set(amounts[5:]) == {2048}


@pytest.mark.parametrize("own", [0.0, 0.02, 0.04])
def test_a_step_keeps_to_its_limit(own):
    """What is too slow is tried again, but seldom."""
    cost = lambda n: own + 1e-4 * n
    amounts = run(Pace(0.05), cost, 400)
    slow = [n for n in amounts if cost(n) > 0.05]
    assert len(slow) <= 0.02 * len(amounts)
    maximum = max(n for n in PROMPT_TOKENS if cost(n) <= 0.05)
    assert amounts.count(maximum) >= 0.9 * len(amounts)


def test_one_slow_step_is_forgotten():
    """The first steps compile a program, for 10 s each."""
    seen = set()

    def cost(n):
        is_new = n not in seen
        seen.add(n)
        return 10.0 if is_new else 0.012 + 16e-6 * n

    amounts = run(Pace(0.05), cost, 1500)
    assert amounts[-1] == PROMPT_TOKENS[-1]


def test_a_device_for_which_all_is_too_slow_reads_the_minimum():
    assert run(Pace(0.05), lambda n: 1.0, 50)[-1] == PROMPT_TOKENS[0]
