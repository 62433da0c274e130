"""What a server does on an H100, foretold: real batch, scheduler and loop on a card with a virtual clock."""

import itertools

import pytest

from qwen3_moe_jax.jax_backend import generate
from qwen3_moe_jax.testing.virtual_card import Card, Server, request

SLOTS, CONTEXT = 64, 4320
CHATS, PROMPT, NEW = 64, 512, 128
ARRIVING = 2.5e-3
"""Seconds that the front takes for a request."""


def quantile(values, share):
    return values[min(len(values) - 1, int(share * len(values)))]


def alone(monkeypatch):
    """Tokens per second of the same chats without a server."""
    card = Card()
    card.install(monkeypatch)
    batch, left = card.batch(SLOTS, CONTEXT), CHATS
    for _ in range(CHATS):
        batch.admit([5] * PROMPT, max_tokens=NEW)
    while left:
        tokens = 1 if batch.waiting else 8
        left -= sum(p.finish_reason is not None for p in batch.step(tokens, ahead=tokens))
    return CHATS * NEW / card.now


@pytest.fixture
def server(monkeypatch):
    return Server(monkeypatch, SLOTS, CONTEXT)


def test_waves_of_chats_keep_the_card_busy(server, monkeypatch):
    """The first is as quick as the next."""
    rates = []
    for wave in range(2):
        seen = server.play([(ARRIVING * n, request(100 * wave + n, PROMPT, NEW)) for n in range(CHATS)])
        assert seen.tokens == CHATS * NEW
        assert seen.idle < 0.05
        assert quantile(seen.first, 0.95) <= 1.2
        gaps = seen.gaps(seen.asked)
        assert quantile(gaps, 0.5) < 0.02, "one token at a time"
        assert quantile(gaps, 0.99) <= 0.075, "while others wait for one another"
        rates.append(seen.tokens / seen.seconds)
    assert rates[0] >= 0.98 * rates[1]
    assert rates[0] >= 0.9 * alone(monkeypatch)


def test_one_slow_step_costs_the_next_wave_nothing(server, monkeypatch):
    """The first wave's third step that reads prompts takes 0.15 s longer than it should."""
    read, count = server.card.prefill, itertools.count(1)

    def slow_once(*arguments, **options):
        server.card.now += 0.15 if next(count) == 3 else 0.0
        return read(*arguments, **options)

    monkeypatch.setattr(generate, "prefill", slow_once)
    waves = [[(ARRIVING * n, request(100 * w + n, PROMPT, NEW)) for n in range(CHATS)] for w in range(2)]
    slow, after = (server.play(wave) for wave in waves)
    assert quantile(after.first, 0.95) <= 1.0
    assert after.seconds < slow.seconds


@pytest.mark.parametrize("running", [1, 8, 16, 32, 63])
def test_running_answers_go_on_beside_a_long_prompt(server, running):
    long = request(1000, 4096, 1)
    chats = [(ARRIVING * n, request(n, PROMPT, 1000)) for n in range(running)]
    seen = server.play([*chats, (1.5, long)])
    begin, end = seen.asked[1000], seen.times[1000][0]
    gaps = [
        b - a for n in range(running) for a, b in itertools.pairwise(seen.times[n]) if begin <= b and a <= end
    ]
    assert max(gaps) <= 0.05
    assert end - begin <= 0.4
    assert seen.idle < 0.05


def test_more_chats_than_slots_keep_the_card_busy(server):
    seen = server.play([(ARRIVING * n, request(n, PROMPT, 32 + n % 96)) for n in range(2 * SLOTS)])
    assert seen.idle < 0.05


def test_a_chat_alone_has_its_first_token_soon(server):
    seen = server.play([(2.0 * n, request(n, PROMPT, 16)) for n in range(3)])
    assert seen.first[-1] <= 0.04
    assert len(seen.times[0]) > 1
