"""How fast the server is beside its own engine: one run measures the batch alone, then clients over HTTP.

    python -m scripts.bench_serve [--model FILE] [--clients 16] [--prompt 64] [--tokens 64] [--rounds 2]
    python -m scripts.bench_serve --parts all --receipt docs/receipts/serve_cpu.json
    python -m scripts.bench_serve --h100 --model FILE --receipt docs/receipts/serve_h100.json

Both do the same work with the same number of slots. The load generator is this process, the server is a
child: clients of one event loop on sockets of their own. ``--h100`` asks for what a GPU must show. Parts:

ratio     tokens per second over HTTP beside the batch alone, times to the first token
front     events per second that the front streams without an engine
mixed     gaps between tokens of running streams while a long prompt is read
overload  ten times the capacity: statuses, times of the refusals, what is still written
cold      one wave of all clients at once: the times of the first tokens
shared    all clients share a long prefix, against prefixes of their own
turn      the second turn of a long chat: the time to its first token

The last line is JSON.
"""

import argparse
import asyncio
import contextlib
import json
import os
import platform
import random
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from qwen3_moe_jax.convert.open_model import open_model
from qwen3_moe_jax.loader import embedded_model
from scripts import ROOT

PARTS = ("ratio", "front", "mixed", "overload", "cold", "shared", "turn")
CPU_PARTS = ("ratio", "front", "mixed", "overload", "turn")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", help="a .gguf file (default: the embedded model)")
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--prompt", type=int, default=64, help="tokens of each prompt")
    parser.add_argument("--tokens", type=int, default=64, help="new tokens of each answer")
    parser.add_argument(
        "--long", type=int, default=1024, help="tokens of a long prompt, or of a shared prefix"
    )
    parser.add_argument("--rounds", type=int, default=2, help="the best counts")
    parser.add_argument("--parts", nargs="+", default=["ratio"], choices=(*PARTS, "all"))
    parser.add_argument(
        "--h100", action="store_true", help="64 chats of 512 and 128, prefixes of 4,096, 8,192"
    )
    parser.add_argument("--receipt", type=Path, help="write the figures there too")
    args = parser.parse_args()
    if args.h100:
        args.clients, args.prompt, args.tokens, args.long = 64, 512, 128, 4096
        args.parts = ["ratio", "cold", "shared", "turn", "mixed", "overload", "front"]
    elif "all" in args.parts:
        args.parts = list(CPU_PARTS)
    return args


def vocabulary(path: str | None) -> int:
    with open_model(path or embedded_model()) as source:
        return source.config.vocab_size


def prompts(args: argparse.Namespace, seed: int, *, count: int | None = None, tokens: int | None = None):
    """Random prompts; no two share a beginning."""
    rng, size = random.Random(seed), min(args.vocabulary, 4000)
    return [
        [rng.randrange(256, size) for _ in range(tokens or args.prompt)] for _ in range(count or args.clients)
    ]


# -- the engine alone, in a child that ends before the server starts


def alone(args: argparse.Namespace) -> dict[str, float]:
    """The batch without a server: every prompt at once."""
    from qwen3_moe_jax.api import load

    with load(args.model, backend="jax", gate=False) as model:
        batch = model.runner.open_batch(args.clients, context=args.prompt + args.tokens + 16)
        rates = []
        for number in range(args.rounds + 1):
            began, first = time.perf_counter(), []
            for ids in prompts(args, number):
                batch.admit(ids, max_tokens=args.tokens)
            done = count = 0
            started: set[int] = set()
            while done < args.clients:
                tokens = 1 if batch.waiting else 8
                for p in batch.step(tokens, ahead=0 if batch.waiting else 8):
                    if p.slot not in started:
                        started.add(p.slot)
                        first.append(time.perf_counter() - began)
                    count += len(p.tokens)
                    if p.finish_reason:
                        done += 1
                        batch.free(p.slot)
            rates.append((count / (time.perf_counter() - began), quantile(first, 0.5), quantile(first, 0.95)))
        best = max(rates[1:])
    return {"tokens_per_second": best[0], "first_p50": best[1], "first_p95": best[2]}


def in_child(name: str, args: argparse.Namespace) -> dict[str, float]:
    """What a function of this module gives in a process of its own: its memory is free afterwards."""
    command = [
        sys.executable,
        "-m",
        "scripts.bench_serve",
        "--child",
        name,
        json.dumps(vars(args), default=str),
    ]
    done = subprocess.run(command, stdout=subprocess.PIPE, check=True, cwd=ROOT)
    return json.loads(done.stdout.splitlines()[-1])


# -- the server, in a child


@contextlib.contextmanager
def server(args: argparse.Namespace, *, context: int, fake: bool = False, **options: Any) -> Iterator[int]:
    """A server until the block ends: its port."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m"]
    if fake:
        command += ["scripts.bench_serve", "--child", "null_server", json.dumps({"port": port})]
    else:
        command += ["qwen3_moe_jax.cli", "serve", "--port", str(port), "--backend", "jax", "--no-gate"]
        command += [args.model] if args.model else []
        options = {"slots": args.clients, "context": context, **options}
        command += ["--no-page"]
        command += [
            word for key, value in options.items() for word in (f"--{key.replace('_', '-')}", str(value))
        ]
    with tempfile.TemporaryFile() as words:
        process = subprocess.Popen(command, cwd=ROOT, stderr=words, stdout=subprocess.DEVNULL)
        try:
            if not asyncio.run(until_healthy(port, process)):
                words.seek(0)
                raise SystemExit(f"the server did not start:\n{words.read().decode()}")
            yield port
        finally:
            process.terminate()
            process.wait(60)


async def until_healthy(port: int, process: subprocess.Popen) -> bool:
    """Whether the server came up; False when it ended first."""
    while process.poll() is None:
        with contextlib.suppress(OSError):
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(b"GET /health HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
            head = await reader.read()
            writer.close()
            if b" 200 " in head[:20]:
                return True
        await asyncio.sleep(0.2)
    return False


async def ask(port: int, ids: list[int], tokens: int, *, cache: bool = False) -> dict[str, Any]:
    """One streamed completion: when its events came, how many tokens, or the status of a refusal."""
    body = {"prompt": ids, "max_tokens": tokens, "temperature": 0, "stream": True, "cache_prompt": cache}
    content = json.dumps({**body, "stream_options": {"include_usage": True}}).encode()
    began = time.perf_counter()
    reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=1 << 22)
    head = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n"
    writer.write(
        head + b"Content-Type: application/json" + b"\r\nContent-Length: %d\r\n\r\n" % len(content) + content
    )
    status = int((await reader.readline()).split()[1])
    times: list[float] = []
    usage: dict[str, Any] = {}
    while line := await reader.readline():
        if line.startswith(b"data: {"):
            if b'"choices":[]' in line:
                usage = json.loads(line[6:])["usage"]
            else:
                times.append(time.perf_counter())
    writer.close()
    found: dict[str, Any] = {"status": status, "seconds": time.perf_counter() - began}
    if status == 200 and times:
        found |= {"first": times[0] - began, "tokens": usage.get("completion_tokens", 0), "times": times}
        found["cached"] = usage.get("prompt_tokens_details", {}).get("cached_tokens", 0)
    return found


def quantile(values: list[float], share: float) -> float | None:
    """The value below which this share of them lies."""
    return sorted(values)[min(len(values) - 1, int(share * len(values)))] if values else None


def wave(port: int, work: list[list[int]], tokens: int, *, cache: bool = False) -> dict[str, Any]:
    """All of these at once."""

    async def main() -> tuple[list[dict[str, Any]], float]:
        began = time.perf_counter()
        found = await asyncio.gather(*(ask(port, ids, tokens, cache=cache) for ids in work))
        return list(found), time.perf_counter() - began

    found, seconds = asyncio.run(main())
    good = [f for f in found if f["status"] == 200]
    first = [f["first"] for f in good]
    return {
        "tokens_per_second": sum(f["tokens"] for f in good) / seconds,
        "seconds": seconds,
        "first_p50": quantile(first, 0.5),
        "first_p95": quantile(first, 0.95),
        "cached_tokens": sum(f["cached"] for f in good),
        "statuses": {
            str(s): sum(f["status"] == s for f in found) for s in sorted({f["status"] for f in found})
        },
        "refused_p99": quantile([f["seconds"] for f in found if f["status"] == 429], 0.99),
    }


# -- parts: those of one server, in an order in which none spoils the next


def cold(args: argparse.Namespace, port: int) -> dict[str, Any]:
    """Nothing has been asked before but what the server itself warmed up."""
    return wave(port, prompts(args, 7), args.tokens)


def ratio(args: argparse.Namespace, port: int) -> dict[str, Any]:
    """The best wave, and single requests of two tokens."""
    wave(port, prompts(args, 0), args.tokens)
    waves = [wave(port, prompts(args, n + 1), args.tokens) for n in range(args.rounds)]
    best = max(waves, key=lambda w: w["tokens_per_second"])
    one = [wave(port, prompts(args, 50 + n, count=1), 2)["first_p50"] for n in range(20)]
    return {"served": best, "first_token_of_one": {"p50": quantile(one, 0.5), "p95": quantile(one, 0.95)}}


def overload(args: argparse.Namespace, port: int) -> dict[str, Any]:
    """Ten times what slots and queue hold."""
    plain = wave(port, prompts(args, 1), args.tokens)
    found = wave(port, prompts(args, 2, count=10 * args.clients), args.tokens)
    return {**found, "share_of_plain": found["tokens_per_second"] / plain["tokens_per_second"]}


def mixed(args: argparse.Namespace, port: int) -> dict[str, Any]:
    """Half of the clients write when a long prompt comes."""
    work = prompts(args, 3, count=max(1, args.clients // 2))
    long = prompts(args, 4, count=2, tokens=args.long)

    async def main(prompt: list[int]) -> tuple[list[dict[str, Any]], float, float]:
        running = [asyncio.ensure_future(ask(port, ids, args.long // 2)) for ids in work]
        while not await decodes(port):
            await asyncio.sleep(0.05)
        began = time.perf_counter()
        await ask(port, prompt, 1)
        ended = time.perf_counter()
        return [await task for task in running], began, ended

    asyncio.run(main(long[0]))  # what it compiles
    found, began, ended = asyncio.run(main(long[1]))
    gaps = [(b, b - a) for f in found for a, b in zip(f["times"], f["times"][1:], strict=False)]
    during = [gap for at, gap in gaps if began <= at <= ended]
    return {
        "prompt": args.long,
        "prompt_seconds": ended - began,
        "gap_p50": quantile(during, 0.5),
        "gap_p99": quantile(during, 0.99),
        "gaps": len(during),
    }


async def decodes(port: int) -> bool:
    """Whether something is being written."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(b"GET /health/decode HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
    text = await reader.read()
    writer.close()
    return b"decoding" in text


def shared(args: argparse.Namespace, port: int) -> dict[str, Any]:
    """Each has a prefix of its own; then all have one."""
    tails = prompts(args, 11, tokens=32)
    own = [a + b for a, b in zip(prompts(args, 12, tokens=args.long), tails, strict=True)]
    prefix = prompts(args, 13, count=1, tokens=args.long)[0]
    apart = wave(port, own, args.tokens, cache=True)
    wave(port, [prefix + [300]], 1, cache=True)
    together = wave(port, [prefix + tail for tail in tails], args.tokens, cache=True)
    times = together["tokens_per_second"] / apart["tokens_per_second"]
    return {"prefix": args.long, "apart": apart, "together": together, "times": times}


SHARING = {f.__name__: f for f in (cold, ratio, mixed, shared, overload)}
"""Parts that one server can take one after the other."""


def with_one_server(args: argparse.Namespace) -> dict[str, Any]:
    """The figures of all parts that share a server, and of the batch alone."""
    parts = [name for name in SHARING if name in args.parts]
    if not parts:
        return {}
    figures: dict[str, Any] = {"alone": in_child("alone", args)} if "ratio" in parts else {}
    needs_long = {"mixed", "shared"} & set(parts)
    room = max(args.prompt, 1.5 * args.long if needs_long else 0)
    with server(args, context=int(room) + args.tokens + 64, max_queue=args.clients) as port:
        for name in parts:
            figures[name] = SHARING[name](args, port)
            print(f"{name}: {json.dumps(figures[name])}", file=sys.stderr, flush=True)
    if "ratio" in parts:
        served, alone_rate = figures["ratio"]["served"], figures["alone"]["tokens_per_second"]
        figures["ratio"]["ratio"] = served["tokens_per_second"] / alone_rate
    return figures


# -- parts with a server of their own


def turn(args: argparse.Namespace) -> dict[str, Any]:
    """A chat of ``2 * long`` tokens, its answer, and a second turn."""
    long, first, second = 2 * args.long, [], []
    with server(args, context=long + 256, slots=2) as port:
        for talk in prompts(args, 21, count=3, tokens=long):
            more = prompts(args, 22, count=1, tokens=24)[0]
            first.append(wave(port, [talk], 8, cache=True)["first_p50"])
            second.append(wave(port, [talk + more], 8, cache=True)["first_p50"])
    return {
        "tokens": long,
        "first_turn": first[-1],
        "second_turn": min(second),
        "share": min(second) / first[-1],
    }


def front(args: argparse.Namespace) -> dict[str, Any]:
    """64 streams of an engine that costs nothing."""
    with server(args, context=4096, fake=True) as port:
        work = [[300, 301, 302] for _ in range(64)]
        wave(port, work, 64)
        found = wave(port, work, 512)
    return {"streams": 64, "events_per_second": found["tokens_per_second"]}


def null_server(port: int) -> None:
    """A server whose engine writes at once whatever it is asked for."""
    from qwen3_moe_jax.serve.engine.frames import Start
    from qwen3_moe_jax.serve.run import Server, make_service
    from qwen3_moe_jax.serve.settings import Settings
    from qwen3_moe_jax.testing.fake_engine import FakeEngine

    async def main() -> None:
        start = Start(None, warm_up=False)
        service = make_service(Settings(port=port), start)
        service.engine = FakeEngine(start, slots=64, capacity=4096)
        instance = Server(service)
        import signal

        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, instance.stop)
        await instance.run()

    asyncio.run(main())


def machine() -> dict[str, Any]:
    load = os.getloadavg()[0]
    return {
        "cores": os.cpu_count(),
        "machine": platform.machine(),
        "python": platform.python_version(),
        "load": load,
    }


def child(name: str, text: str) -> None:
    """The work of a child of this script."""
    values = json.loads(text)
    if name == "null_server":
        null_server(**values)
        return
    print(json.dumps(alone(argparse.Namespace(**values))))


def main() -> None:
    if sys.argv[1:2] == ["--child"]:
        child(*sys.argv[2:4])
        return
    args = parse()
    args.vocabulary = vocabulary(args.model)
    figures = with_one_server(args)
    for name, part in (("turn", turn), ("front", front)):
        if name in args.parts:
            figures[name] = part(args)
            print(f"{name}: {json.dumps(figures[name])}", file=sys.stderr, flush=True)
    command = f"python -m scripts.bench_serve {' '.join(sys.argv[1:])}"
    shape = {"clients": args.clients, "prompt": args.prompt, "tokens": args.tokens}
    found = {"what": command, **machine(), "model": args.model or "embedded", **shape, "figures": figures}
    if args.receipt:
        args.receipt.write_text(json.dumps(found, indent=1) + "\n")
    print(json.dumps(found))


if __name__ == "__main__":
    main()
