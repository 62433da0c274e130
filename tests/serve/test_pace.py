"""How much of prompts a mixed step reads: steps of known cost, no clock."""

from types import SimpleNamespace

import pytest

from qwen3_moe_jax.serve.engine import worker
from qwen3_moe_jax.serve.engine.jobs import Wrote
from qwen3_moe_jax.serve.engine.pace import PROMPT_TOKENS, Pace, Stride


def run(pace, cost, steps):
    """What each step was to read."""
    amounts = []
    for _ in range(steps):
        amounts.append(pace.prompt_tokens(is_decoding=True))
        pace.took(amounts[-1], cost(amounts[-1]))
    return amounts


def test_with_nobody_to_hold_up_all_is_read():
    assert Pace(0.05).prompt_tokens(is_decoding=False) == PROMPT_TOKENS[-1]
    assert Pace(float("inf")).prompt_tokens(is_decoding=True) == PROMPT_TOKENS[-1]


def test_a_steps_own_cost_is_not_that_of_its_tokens():
    """12 ms and 16 us per token: 2,048 tokens take 45 ms, and seconds per token of 1,024 would say 57."""
    amounts = run(Pace(0.05), lambda n: 0.012 + 16e-6 * n, 20)
    assert amounts[:4] == [128, 512, 1024, 2048]
    assert set(amounts[4:]) == {2048}


@pytest.mark.parametrize("own", [0.0, 0.02, 0.04])
def test_a_step_keeps_to_its_limit(own):
    """What is too slow is tried again, but seldom."""
    cost = lambda n: own + 1e-4 * n
    amounts = run(Pace(0.05), cost, 400)
    slow = [n for n in amounts if cost(n) > 0.05]
    assert len(slow) <= 0.02 * len(amounts)
    maximum = max(n for n in PROMPT_TOKENS if cost(n) <= 0.05)
    assert amounts.count(maximum) >= 0.9 * len(amounts)


def test_where_prompts_wait_for_one_another_a_step_may_take_longer():
    pace = Pace(0.05)
    for tokens in (512, 1024, 2048):
        pace.took(tokens, 0.033 + 16.6e-6 * tokens, is_decoding=True)
        pace.took(tokens, 0.033 + 16.6e-6 * tokens, is_decoding=True)
    assert pace.prompt_tokens(is_decoding=True, waiting=1) == 1024
    assert pace.prompt_tokens(is_decoding=True, waiting=2) == 2048


def test_what_steps_took_that_held_nobody_up_is_where_it_begins():
    """Not 128, which a GPU reads in the time of 512."""
    pace = Pace(0.05)
    for tokens in (512, 1024, 2048):
        pace.took(tokens, 0.015 + 16.6e-6 * tokens, is_decoding=False)
    assert pace.prompt_tokens(is_decoding=True) == 2048
    for _ in range(9):
        pace.took(2048, 0.068)
    assert pace.prompt_tokens(is_decoding=True) == 1024


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


def test_an_amount_that_was_slow_once_is_tried_again():
    """What made it slow may have been chance, and the next 100 steps would pay for it."""
    pace = Pace(0.05)
    pace.took(128, 0.015)
    pace.took(256, 0.2)
    assert pace.prompt_tokens(is_decoding=True) == 256
    pace.took(256, 0.2)
    assert pace.prompt_tokens(is_decoding=True) == 128


def test_one_slow_step_among_many_changes_nothing_and_two_do():
    pace = Pace(0.05)
    for _ in range(9):
        pace.took(2048, 0.06)
    pace.took(2048, 0.2)
    for _ in range(9):
        pace.took(2048, 0.06)
    pace.took(2048, 0.2)
    assert pace.prompt_tokens(is_decoding=True, waiting=8) == 2048
    pace.took(2048, 0.2)
    assert pace.prompt_tokens(is_decoding=True, waiting=8) < 2048


def test_a_dispatch_is_as_long_as_fits():
    """16 sequences at 4 ms per token, then one at 1 ms: 25 ms hold 6 and, not more than the maximum, 16."""
    stride = Stride(0.025, 16)
    for sequences, cost, tokens in ((16, 0.004, 6), (1, 0.001, 16), (8, 0.3, 1)):
        for _ in range(8):
            now = stride.tokens(sequences)
            stride.took(sequences, now, 0.0005 + cost * now)
        assert stride.tokens(sequences) == tokens
    assert stride.tokens(16) == 6


def test_a_slow_dispatch_is_forgotten_soon():
    stride = Stride(0.025, 16)
    for seconds in (0.002, 1.0):
        stride.took(1, 1, seconds)
    assert stride.tokens(1) == 1
    for _ in range(20):
        stride.took(1, 1, 0.002)
    assert stride.tokens(1) == 12


def test_without_a_limit_a_dispatch_is_the_longest():
    """A GPU is asked for the next step before this one ends."""
    stride = Stride(float("inf"), 8)
    stride.took(16, 2, 0.5)
    assert stride.tokens(16) == 8


class Turns:
    """An engine and its scheduler: each turn costs a second, and makes programs as it is told."""

    programs, device_kind, reading = 0, "cpu", {}
    waiting_prompts, is_decoding, running = 1, True, (0, 1)

    def __init__(self, monkeypatch):
        self.now, self.makes, self.scheduler, self.steps = 0.0, 0, self, []
        self.batch, self.reads = self, True
        monkeypatch.setattr(worker, "time", SimpleNamespace(perf_counter=lambda: self.now))

    def turn(self, *, prompt_tokens, max_step):
        self.now, self.programs = self.now + 1.0, self.programs + self.makes
        self.steps.append((prompt_tokens, max_step))
        self.read_tokens = prompt_tokens * self.reads
        return [Wrote(1, [5], None), Wrote(2, [5, 6], None)]

    def tidy(self):
        pass


@pytest.mark.parametrize("reads", [True, False])
def test_what_makes_a_program_says_nothing_of_the_next_step(monkeypatch, reads):
    turns = Turns(monkeypatch)
    turns.reads = reads
    loop = worker.Loop(turns, None, None, 50.0)
    turns.makes = 1
    for _ in range(3):
        loop._turn(turns)
    assert set(turns.steps) == {(128, 2)}
    turns.makes = 0
    for _ in range(3):
        loop._turn(turns)
    assert turns.steps[-1] == ((64, 2) if reads else (128, 1))
