"""What process 0 says is enough for the others: the same decisions, the same tokens."""

import contextlib
import queue
import random
import socket
from types import SimpleNamespace

import pytest

from qwen3_moe_jax.core.sampling import Sampling
from qwen3_moe_jax.serve.engine import frames, relay
from qwen3_moe_jax.serve.engine import worker as worker_module
from qwen3_moe_jax.serve.engine.prefix import PrefixCache
from qwen3_moe_jax.serve.engine.scheduler import Scheduler
from qwen3_moe_jax.serve.engine.worker import Engine, Loop
from qwen3_moe_jax.testing.fake_batch import FakeBatch


def engine(**options) -> SimpleNamespace:
    """What a loop asks of an engine, with a fake batch."""
    batch = lambda: FakeBatch(rooms=(64, 64, 64, 256), **options)
    scheduler = Scheduler(batch, prefixes=PrefixCache(), keep_log=True)
    made = SimpleNamespace(scheduler=scheduler, reading={}, programs=0, device_kind="cpu", tidied=0)
    made.turn = lambda **amounts: Engine.turn(made, **amounts)
    made.counters = dict
    made.score = lambda m: frames.Scored(m.id, [], [])
    made.tidy = lambda: None
    return made


@pytest.fixture
def said(monkeypatch):
    """Frames that process 0 sends."""
    found: list[bytes] = []
    peers = SimpleNamespace(from_first=lambda name, body: found.append(body))
    monkeypatch.setattr(relay.processes, "joined", lambda: peers)
    return found


def taken(front: socket.socket) -> None:
    """Reads what the engine has reported."""
    with contextlib.suppress(BlockingIOError):
        front.recv(1 << 20, socket.MSG_DONTWAIT)


def submit(number: int, rng: random.Random) -> frames.Submit:
    tokens = [rng.randrange(5) for _ in range(rng.randrange(1, 50))]
    key, scope = rng.choice("ab"), rng.choice([None, "s"])
    return frames.Submit(number, key, tokens, Sampling(), rng.randrange(1, 60), [], scope=scope)


@pytest.mark.parametrize("seed", range(5))
def test_the_others_decide_the_same(said, seed):
    rng, inbox, first = random.Random(seed), queue.SimpleQueue(), engine()
    ours, front = socket.socketpair()
    with ours, front:
        loop = Loop(first, ours, inbox, 50.0)
        for number in range(40):
            inbox.put(submit(number, rng))
            if rng.random() < 0.2:
                inbox.put(frames.Cancel(rng.randrange(number + 1)))
            if rng.random() < 0.1:
                inbox.put(frames.Score(1000 + number, [1, 2, 3]))
            loop.go_on()
            taken(front)
        while first.scheduler.has_work:
            loop.go_on()
            taken(front)
    other = engine()
    for body in said:
        relay.carry_out(other, relay._decoder.decode(body))
    assert other.scheduler.log == first.scheduler.log
    assert not other.scheduler.has_work
    assert other.scheduler.batch.rows == first.scheduler.batch.rows


def test_a_step_that_fails_ends_the_engine_of_several_processes(monkeypatch):
    one = engine(fails_at=frozenset(range(3)))
    one.scheduler.submit(relay.reports.job_of(submit(1, random.Random(0))))
    monkeypatch.setattr(worker_module.processes, "count", lambda: 2)
    with pytest.raises(RuntimeError, match="the engine's step failed, in one of 2 processes"):
        one.turn(prompt_tokens=64, max_step=8)


def test_one_process_says_nothing():
    relay.tell(relay.Turn(1, 1))
