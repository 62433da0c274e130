"""The batch without a server, for the same work as ``scripts.bench_serve``'s clients ask for."""

import argparse
import contextlib
import json
import random
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

from scripts._load_generator import quantile

Ask = tuple[list[int], int]
"""A prompt's ids, and how many tokens are to be written."""


def prompts(
    args: argparse.Namespace, seed: int, *, count: int | None = None, tokens: int | None = None
) -> list[list[int]]:
    """Random prompts; no two share a beginning."""
    rng, size = random.Random(seed), min(args.vocabulary, 4000)
    return [
        [rng.randrange(256, size) for _ in range(tokens or args.prompt)] for _ in range(count or args.clients)
    ]


def chats(args: argparse.Namespace, seed: int) -> list[list[Ask]]:
    """For each client ``args.asks`` prompts, asked one after the other; answers of half to one and a half
    times ``args.tokens``, so that clients do not stay in step."""
    rng, ids = random.Random(seed), iter(prompts(args, seed, count=args.clients * args.asks))
    length = lambda: rng.randrange(args.tokens // 2, args.tokens * 3 // 2 + 1)
    return [[(next(ids), length()) for _ in range(args.asks)] for _ in range(args.clients)]


def alone(args: argparse.Namespace) -> dict[str, float | None]:
    """The batch without a server: every prompt at once."""
    with _open(args) as do:
        runs = [do([[(ids, args.tokens)] for ids in prompts(args, n)]) for n in range(args.rounds + 1)]
    best = max(runs[1:])
    return {"tokens_per_second": best[0], "first_p50": best[1], "first_p95": best[2]}


def steady_alone(args: argparse.Namespace) -> dict[str, float | None]:
    """The batch without a server: the next prompt of a client when its last has been answered."""
    with _open(args) as do:
        runs = [do(chats(args, 60 + n)) for n in range(args.rounds + 1)]
    return {"tokens_per_second": max(runs[1:])[0]}


def turns(args: argparse.Namespace) -> None:
    """Works when it is asked to: lines of JSON, ``["prompts" or "chats", seed]``, until the end of the input;
    answers what ``run`` gives."""
    with _open(args) as do:
        for line in sys.stdin:
            kind, seed = json.loads(line)
            asks = [[(ids, args.tokens)] for ids in prompts(args, seed)]
            print(json.dumps(do(asks if kind == "prompts" else chats(args, seed))), flush=True)


@contextlib.contextmanager
def _open(args: argparse.Namespace) -> Iterator[Callable[[list[list[Ask]]], tuple[float | None, ...]]]:
    """Opens the batch; gives ``run`` of it."""
    from qwen3_moe_jax.api import load

    with load(args.model, backend="jax", gate=False) as model:
        batch = model.runner.open_batch(args.clients, context=args.context)
        batch.make_programs()  # as the server has them: none is made in a pause, which is another one's turn
        yield partial(run, batch)


def run(batch: Any, work: list[list[Ask]]) -> tuple[float | None, ...]:
    """Tokens per second, and the median and the 95th percentile of the times to a first token, since the
    start."""
    began, first, count = time.perf_counter(), [], 0
    started: set[int] = set()
    clients = [list(reversed(asks)) for asks in work]
    running = {_admit(batch, asks): asks for asks in clients}  # slots, and what is left of their clients
    while running:
        tokens = 1 if batch.waiting else 8
        for p in batch.step(tokens, ahead=tokens):
            if p.slot not in started:
                started.add(p.slot)
                first.append(time.perf_counter() - began)
            count += len(p.tokens)
            if p.finish_reason:
                batch.free(p.slot)
                if asks := running.pop(p.slot):
                    running[_admit(batch, asks)] = asks
    rate = count / (time.perf_counter() - began)
    return rate, quantile(first, 0.5), quantile(first, 0.95)


def _admit(batch: Any, asks: list[Ask]) -> int:
    """Takes the last of these; gives its slot."""
    ids, tokens = asks.pop()
    return batch.admit(ids, max_tokens=tokens)
