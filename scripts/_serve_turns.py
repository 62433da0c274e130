"""The server and its batch alone, in turns: a machine's rate can change by half in a minute."""

import argparse
import contextlib
import json
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import psutil

from scripts import ROOT
from scripts._load_generator import quantile, talks, wave
from scripts._serve_alone import chats, prompts

Alone = Callable[[str, int], list[float]]
"""What ``_serve_alone.run`` gives, for a kind of work and a seed."""


@contextlib.contextmanager
def batch_alone(args: argparse.Namespace) -> Iterator[Alone]:
    """The batch without a server, in a child that stays and works when it is asked to."""
    command = [sys.executable, "-m", "scripts.bench_serve", "--child", "turns"]
    given = json.dumps(vars(args), default=str)
    child = subprocess.Popen(
        [*command, given], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT
    )
    assert child.stdin is not None
    assert child.stdout is not None
    asking, answers = child.stdin, child.stdout

    def run(kind: str, seed: int) -> list[float]:
        print(json.dumps([kind, seed]), file=asking, flush=True)
        if not (answer := answers.readline()):
            raise RuntimeError("the batch alone ended")
        return json.loads(answer)

    try:
        for kind in ("prompts", "chats"):  # what it compiles
            run(kind, 0)
        yield run
    finally:
        asking.close()
        child.wait(30)


def in_child(name: str, args: argparse.Namespace) -> dict[str, Any]:
    """What a function of this module gives in a process of its own: its memory is free afterwards."""
    command = [
        sys.executable,
        "-m",
        "scripts.bench_serve",
        "--child",
        name,
        json.dumps(vars(args), default=str),
    ]
    done = subprocess.run(command, stdout=subprocess.PIPE, check=True, cwd=ROOT, timeout=args.part_seconds)
    return json.loads(done.stdout.splitlines()[-1])


def _in_turns(args: argparse.Namespace, alone: Alone, kind: str, serve: Callable[[int], Any]) -> dict:
    """``args.rounds`` pairs of the same work, the other one first in every second pair."""
    served, rates = [], []
    for n in range(args.rounds):
        steps = [lambda n=n: served.append(serve(n + 1)), lambda n=n: rates.append(alone(kind, n + 1))]
        for step in steps if n % 2 else reversed(steps):
            step()
    shares = [s["tokens_per_second"] / rate for s, (rate, *_) in zip(served, rates, strict=True)]
    return {
        "served": max(served, key=lambda w: w["tokens_per_second"]),
        "served_tokens_per_second": [s["tokens_per_second"] for s in served],
        "alone_tokens_per_second": [rate for rate, *_ in rates],
        "alone_first_p95": statistics.median(p95 for *_, p95 in rates),
        "shares": shares,
        "ratio": statistics.median(shares),
    }


def ratio(args: argparse.Namespace, port: int, alone: Alone) -> dict[str, Any]:
    """Waves beside the batch alone, and single requests."""
    wave(args, port, prompts(args, 0), args.tokens)
    seconds: list[float] = []

    def serve(seed: int) -> dict[str, Any]:
        before = front_seconds()
        found = wave(args, port, prompts(args, seed), args.tokens)
        seconds.append(front_seconds() - before)
        return found

    found = _in_turns(args, alone, "prompts", serve)
    cpu = sum(seconds) / (args.rounds * args.clients)
    return {**found, "front_cpu_per_request": cpu, "first_token_of_one": first_of_one(args, port)}


def first_of_one(args: argparse.Namespace, port: int) -> dict[str, float | None]:
    """Seconds to the first token of single requests."""
    one = [wave(args, port, prompts(args, 500 + n, count=1), 2)["first_p50"] for n in range(20)]
    return {"p50": quantile(one, 0.5), "p95": quantile(one, 0.95)}


def steady(args: argparse.Namespace, port: int, alone: Alone) -> dict[str, Any]:
    """Clients that ask again when they have been answered, beside the batch alone."""
    talks(args, port, chats(args, 0))
    return _in_turns(args, alone, "chats", lambda seed: talks(args, port, chats(args, seed)))


def front_seconds() -> float:
    """CPU seconds of the server's front so far: of this process' children, without theirs."""
    return sum(sum(process.cpu_times()[:2]) for process in psutil.Process().children())


TURNS = {f.__name__: f for f in (ratio, steady)}
"""Parts for which the batch alone works beside the server."""
