"""How fast the server is beside its own engine: one run measures the batch alone, then clients over HTTP.

    python -m scripts.bench_serve [--model FILE] [--clients 16] [--prompt 64] [--tokens 64] [--rounds 2]

Both do the same work with the same number of slots. The last line is JSON: tokens per second of both, their
ratio, times to the first token, events per second of the front alone, and what ten times the capacity gets.
"""

import argparse
import asyncio
import json
import random
import statistics
import time

import httpx

from qwen3_moe_jax.serve.engine.frames import Start
from qwen3_moe_jax.serve.http.streams import data
from qwen3_moe_jax.serve.settings import Settings
from qwen3_moe_jax.testing.http_server import running


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", help="a .gguf file (default: the embedded model)")
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--prompt", type=int, default=64, help="tokens of each prompt")
    parser.add_argument("--tokens", type=int, default=64, help="new tokens of each answer")
    parser.add_argument("--rounds", type=int, default=2, help="the best counts")
    parser.add_argument("--overload", action="store_true", help="ten times the capacity too")
    return parser.parse_args()


def prompts(args: argparse.Namespace, vocab_size: int, seed: int) -> list[list[int]]:
    rng = random.Random(seed)
    return [
        [rng.randrange(256, min(vocab_size, 4000)) for _ in range(args.prompt)] for _ in range(args.clients)
    ]


def alone(args: argparse.Namespace) -> dict[str, float]:
    """The batch without a server, in this process: every prompt at once."""
    from qwen3_moe_jax.api import load

    with load(args.model, backend="jax", gate=False) as model:
        batch = model.runner.open_batch(args.clients, context=args.prompt + args.tokens + 16)
        rates = []
        for number in range(args.rounds + 1):
            began, first = time.perf_counter(), None
            for ids in prompts(args, model.config.vocab_size, number):
                batch.admit(ids, max_tokens=args.tokens)
            done = count = 0
            while done < args.clients:
                for p in batch.step(4, ahead=4):
                    first = first or time.perf_counter() - began
                    count += len(p.tokens)
                    if p.finish_reason:
                        done += 1
                        batch.free(p.slot)
            rates.append((count / (time.perf_counter() - began), first))
        best = max(rates[1:])
    return {"tokens_per_second": best[0], "first_token_seconds": best[1]}


async def one(client: httpx.AsyncClient, url: str, ids: list[int], tokens: int) -> dict[str, float]:
    """One streamed completion: when its first event came, when it ended, how many tokens."""
    body = {"prompt": ids, "max_tokens": tokens, "temperature": 0, "stream": True, "cache_prompt": False}
    body["stream_options"] = {"include_usage": True}
    began, first, count = time.perf_counter(), None, 0
    gaps, last = [], None
    async with client.stream("POST", f"{url}/v1/completions", json=body) as reply:
        if reply.status_code != 200:
            await reply.aread()
            return {"status": reply.status_code, "seconds": time.perf_counter() - began}
        async for line in reply.aiter_lines():
            if not line.startswith("data: ") or line == "data: [DONE]":
                continue
            now = time.perf_counter()
            if '"usage"' in line and '"choices":[]' in line:
                count = json.loads(line[6:])["usage"]["completion_tokens"]
                continue
            first = first or now - began
            gaps += [now - last] if last else []
            last = now
    return {
        "status": 200,
        "seconds": time.perf_counter() - began,
        "first": first,
        "tokens": count,
        "gaps": gaps,
    }


async def wave(args: argparse.Namespace, url: str, vocab_size: int, seed: int, times: int = 1) -> dict:
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(timeout=600, limits=limits) as client:
        work = prompts(args, vocab_size, seed) * times
        began = time.perf_counter()
        found = await asyncio.gather(*(one(client, url, ids, args.tokens) for ids in work))
        seconds = time.perf_counter() - began
    good = [f for f in found if f["status"] == 200]
    gaps = sorted(g for f in good for g in f["gaps"])
    return {
        "tokens_per_second": sum(f["tokens"] for f in good) / seconds,
        "first_p50": statistics.median(f["first"] for f in good),
        "first_p95": sorted(f["first"] for f in good)[int(0.95 * (len(good) - 1))],
        "gap_p50": gaps[len(gaps) // 2] if gaps else None,
        "gap_p99": gaps[int(0.99 * (len(gaps) - 1))] if gaps else None,
        "statuses": sorted({f["status"] for f in found}),
        "refused_p99": max((f["seconds"] for f in found if f["status"] == 429), default=None),
    }


def served(args: argparse.Namespace) -> dict:
    start = Start(
        args.model,
        backend="jax",
        gate=False,
        slots=args.clients,
        context=args.prompt + args.tokens + 16,
    )
    with running(Settings(port=0, max_queue=args.clients), start) as server:
        size = server.service.model.vocab_size
        ask = lambda seed, times=1: asyncio.run(wave(args, server.url, size, seed, times))
        ask(0)
        found = max((ask(n + 1) for n in range(args.rounds)), key=lambda w: w["tokens_per_second"])
        if args.overload:
            found["overload"] = ask(99, 10)
    return found


def formatting() -> float:
    """Events per second that the front formats, without a socket."""
    chunk = {
        "id": "x",
        "object": "chat.completion.chunk",
        "created": 1,
        "model": "m",
        "choices": [{"index": 0}],
    }
    began = time.perf_counter()
    for _ in range(50_000):
        data(chunk)
    return 50_000 / (time.perf_counter() - began)


def main() -> None:
    args = parse()
    engine = alone(args)
    print(f"batch alone: {engine['tokens_per_second']:.0f} tokens/s")
    server = served(args)
    print(f"over HTTP:   {server['tokens_per_second']:.0f} tokens/s")
    ratio = server["tokens_per_second"] / engine["tokens_per_second"]
    print(json.dumps({"alone": engine, "served": server, "ratio": ratio, "events_formatted": formatting()}))


if __name__ == "__main__":
    main()
