"""How fast the server is beside its own engine: one run measures the batch alone, then clients over HTTP.

    python -m scripts.bench_serve [--model FILE] [--clients 16] [--prompt 64] [--tokens 64] [--rounds 5]
    python -m scripts.bench_serve --parts all --receipt docs/receipts/serve_cpu.json
    python -m scripts.bench_serve --h100 --model FILE --receipt docs/receipts/serve_h100.json

Both do the same work with the same number of slots. The load generator is this process, the server is a
child: clients of one event loop on sockets of their own. ``--h100`` asks for what a GPU must show. Parts:

ratio     tokens per second over HTTP beside the batch alone, in turns on a CPU, one after the other on a GPU;
          times to the first token, CPU seconds of the front per request
steady    the same where each client asks --asks times, one after the other, for answers of several lengths
front     events per second that the front streams without an engine
mixed     gaps between tokens of running streams while a long prompt is read
overload  ten times the capacity, over the time of a wave and at once: statuses, times of the refusals, what
          is still written
cold      one wave of all clients at once: the times of the first tokens
shared    all clients share a long prefix, against prefixes of their own
bits      how many answers are the same in company and from the cache as alone
turn      the second turn of a long chat: the time to its first token
replicas  --replicas engines with as many times the clients, beside one engine

A part that fails or would begin too late is named, and costs no other; the receipt is written after each.
On a GPU the first start compiles some forty programs, which takes minutes; they are kept, also by a run that
was ended, so that the next run goes on from there.

The last line is JSON.
"""

import argparse
import asyncio
import contextlib
import importlib
import itertools
import json
import os
import platform
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from qwen3_moe_jax.convert.open_model import open_model
from qwen3_moe_jax.loader import embedded_model
from scripts import ROOT, _serve_alone
from scripts._load_generator import ask, quantile, talks, wave, within
from scripts._serve_alone import chats, prompts
from scripts._serve_bits import COUNT, compare
from scripts._serve_turns import TURNS, batch_alone, first_of_one, in_child

PROGRAMS = 'qwen3_moe_engine{name="programs"}'
SETTLED_SECONDS = 5.0
"""A server that has made no program for so long has all: longer than a pause and a compilation take."""

PARTS = ("ratio", "steady", "front", "mixed", "overload", "cold", "shared", "bits", "turn", "replicas")
CPU_PARTS = ("ratio", "steady", "front", "mixed", "overload", "bits", "turn")


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
    parser.add_argument("--batch-invariant", action="store_true", help="serve with it (part bits)")
    parser.add_argument("--asks", type=int, default=6, help="requests of a client (part steady)")
    parser.add_argument(
        "--rounds",
        type=int,
        default=5,
        help="pairs of server and batch alone, whose median counts; --h100: the best",
    )
    parser.add_argument("--replicas", type=int, default=2, help="engines of the part that is called so")
    parser.add_argument("--parts", nargs="+", choices=(*PARTS, "all"), help="ratio; --h100: of one server")
    parser.add_argument(
        "--h100", action="store_true", help="64 chats of 512 and 128, prefixes of 4,096, 8,192"
    )
    parser.add_argument("--seconds", type=float, help="no part begins after so long (1500; --h100: 400)")
    parser.add_argument("--part-seconds", type=float, default=300, help="a part may take so long")
    parser.add_argument("--receipt", type=Path, help="write the figures there too, after each part")
    args = parser.parse_args()
    if args.h100:
        args.clients, args.prompt, args.tokens, args.long = 64, 512, 128, 4096
        args.seconds = args.seconds or 400
        args.parts = args.parts or [name for name in PARTS if name not in ("steady", "front", "replicas")]
    args.parts = args.parts or ["ratio"]
    if "all" in args.parts:
        args.parts = list(CPU_PARTS)
    args.seconds = args.seconds or 1500
    return args


def vocabulary(path: str | None) -> int:
    with open_model(path or embedded_model()) as source:
        return source.config.vocab_size


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
        given = {} if args.batch_invariant else {"slots": args.clients}  # it knows how many keep their bits
        options = {**given, "context": context, **options}
        command += ["--no-page", "--metrics", *(["--batch-invariant"] if args.batch_invariant else [])]
        command += [
            word for key, value in options.items() for word in (f"--{key.replace('_', '-')}", str(value))
        ]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL)
    try:
        began = time.monotonic()
        asyncio.run(within(args.seconds, until_healthy(port, process)))
        say(f"the server was ready after {time.monotonic() - began:.0f} s")
        yield port
    finally:
        process.terminate()
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


async def until_healthy(port: int, process: subprocess.Popen) -> None:
    while process.poll() is None:
        with contextlib.suppress(OSError):
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(b"GET /health HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
            reply = await reader.read()
            writer.close()
            if b" 200 " in reply[:20] and b'"loading"' not in reply:  # each replica, too
                return
        await asyncio.sleep(0.2)
    raise RuntimeError("the server did not start")


def settle(args: argparse.Namespace, port: int) -> None:
    """Waits until the server has made what no request waits for: on a CPU it does so in pauses."""
    made = -1.0
    while True:
        wave(args, port, prompts(args, 90, count=1), 1)
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=30) as reply:
            lines = reply.read().decode().splitlines()
        now = next(float(line.split()[-1]) for line in lines if line.startswith(PROGRAMS))
        if now == made:
            return
        made = now
        time.sleep(SETTLED_SECONDS)


# -- parts: those of one server, in an order in which none spoils the next


def cold(args: argparse.Namespace, port: int) -> dict[str, Any]:
    """No prompt has been seen before: the first wave of a server, and another one."""
    first, second = (wave(args, port, prompts(args, 7 + n), args.tokens) for n in range(2))
    return {**second, "first_wave": first}


def ratio(args: argparse.Namespace, port: int) -> dict[str, Any]:
    """The best of ``args.rounds`` waves."""
    waves = [wave(args, port, prompts(args, n), args.tokens) for n in range(args.rounds + 1)]
    best = max(waves[1:], key=lambda w: w["tokens_per_second"])
    return {"served": best, "first_token_of_one": first_of_one(args, port)}


def steady(args: argparse.Namespace, port: int) -> dict[str, Any]:
    """The best round of clients that ask again when they have been answered."""
    found = [talks(args, port, chats(args, 60 + n)) for n in range(args.rounds + 1)]
    return {"served": max(found[1:], key=lambda w: w["tokens_per_second"])}


def overload(args: argparse.Namespace, port: int) -> dict[str, Any]:
    """Ten times as many as there are slots, in the time of one wave; then as many in one moment."""
    plain = wave(args, port, prompts(args, 1), args.tokens)
    many = lambda seed: prompts(args, seed, count=10 * args.clients)
    found = wave(args, port, many(2), args.tokens, spread=plain["seconds"])
    at_once = wave(args, port, many(3), args.tokens)
    share = found["tokens_per_second"] / plain["tokens_per_second"]
    return {**found, "share_of_plain": share, "at_once": at_once}


def mixed(args: argparse.Namespace, port: int) -> dict[str, Any]:
    """Half of the clients write when a long prompt comes."""
    work = prompts(args, 3, count=max(1, args.clients // 2))
    long = prompts(args, 4, count=2, tokens=args.long)

    async def main(prompt: list[int]) -> tuple[list[list[float]], float, float]:
        times: list[list[float]] = [[] for _ in work]
        pairs = zip(work, times, strict=True)
        running = [asyncio.ensure_future(ask(port, ids, args.long // 2, times=t)) for ids, t in pairs]
        while not all(times):
            await asyncio.sleep(0.05)
        began = time.perf_counter()
        await ask(port, prompt, 1)
        ended = time.perf_counter()
        for task in running:
            task.cancel()
        await asyncio.gather(*running, return_exceptions=True)
        return times, began, ended

    asyncio.run(within(args.part_seconds, main(long[0])))  # what it compiles
    found, began, ended = asyncio.run(within(args.part_seconds, main(long[1])))
    gaps = [(b, b - a) for times in found for a, b in itertools.pairwise(times)]
    during = [gap for at, gap in gaps if began <= at <= ended]
    return {
        "prompt": args.long,
        "prompt_seconds": ended - began,
        "gap_p50": quantile(during, 0.5),
        "gap_p99": quantile(during, 0.99),
        "gaps": len(during),
    }


def shared(args: argparse.Namespace, port: int) -> dict[str, Any]:
    """Each has a prefix of its own; then all have one."""
    tails = prompts(args, 11, tokens=32)
    own = [a + b for a, b in zip(prompts(args, 12, tokens=args.long), tails, strict=True)]
    prefix = prompts(args, 13, count=1, tokens=args.long)[0]
    apart = wave(args, port, own, args.tokens, cache=True)
    wave(args, port, [prefix + [300]], 1, cache=True)
    together = wave(args, port, [prefix + tail for tail in tails], args.tokens, cache=True)
    times = together["tokens_per_second"] / apart["tokens_per_second"]
    return {"prefix": args.long, "apart": apart, "together": together, "times": times}


def bits(args: argparse.Namespace, port: int) -> dict[str, Any]:
    """Answers alone, in company and from the cache."""
    return compare(args, port, prompts(args, 41, count=max(args.clients, COUNT)))


SHARING = {f.__name__: f for f in (cold, ratio, steady, mixed, shared, overload, bits)}
"""Parts that one server can take one after the other."""


class Figures:
    """What was found so far; a part that fails, or would begin too late, is named and costs no other."""

    def __init__(self, args: argparse.Namespace):
        self._args, self._began = args, time.monotonic()
        self.parts: dict[str, Any] = {}

    def take(self, name: str, work: Callable[[], dict[str, Any]]) -> None:
        """Does a part."""
        began = time.monotonic()
        if began - self._began > self._args.seconds:
            self.parts[name] = {"skipped": f"{self._args.seconds:.0f} s were over"}
        else:
            try:
                self.parts[name] = work()
            except Exception as error:
                self.parts[name] = {"failed": f"{type(error).__name__}: {error}"}
        say(f"{name} ({time.monotonic() - began:.0f} s): {json.dumps(self.parts[name])}")
        self.write()

    def write(self) -> dict[str, Any]:
        """The receipt as it is now."""
        args = self._args
        command = f"python -m scripts.bench_serve {' '.join(sys.argv[1:])}"
        shape = {"clients": args.clients, "prompt": args.prompt, "tokens": args.tokens}
        model = Path(args.model).name if args.model else "embedded"
        found = {"what": command, **machine(), "model": model, **shape, "figures": self.parts}
        if args.receipt:
            args.receipt.write_text(json.dumps(found, indent=1) + "\n")
        return found


def with_one_server(args: argparse.Namespace, figures: Figures) -> None:
    """All parts that share a server."""
    parts = [name for name in SHARING if name in args.parts]
    if not parts:
        return
    try:
        with server(args, context=args.context, max_queue=args.clients) as port:
            if not args.h100:  # a GPU's server has made all before it is ready
                settle(args, port)
                in_turns(args, figures, port)
                parts = [name for name in parts if name not in TURNS]
            for name in parts:
                figures.take(name, lambda name=name: SHARING[name](args, port))
    except (RuntimeError, TimeoutError) as error:
        figures.take("server", lambda error=error: {"failed": f"{type(error).__name__}: {error}"})
    if args.h100:
        apart(args, figures)


def in_turns(args: argparse.Namespace, figures: Figures, port: int) -> None:
    """Parts in which the batch alone takes turns with the server."""
    if parts := [name for name in TURNS if name in args.parts]:
        with batch_alone(args) as alone:
            for name in parts:
                figures.take(name, lambda name=name: TURNS[name](args, port, alone))


def apart(args: argparse.Namespace, figures: Figures) -> None:
    """The batch alone on a GPU, whose memory does not hold both: after the server."""
    for part, name in (("ratio", "alone"), ("steady", "steady_alone")):
        if part not in args.parts:
            continue
        figures.take(name, lambda name=name: in_child(name, args))
        with contextlib.suppress(KeyError):
            served, rate = figures.parts[part]["served"], figures.parts[name]["tokens_per_second"]
            figures.parts[part]["ratio"] = served["tokens_per_second"] / rate


def context_of(args: argparse.Namespace) -> int:
    """Tokens that the longest sequence of these parts has."""
    longest = args.prompt + args.tokens * 3 // 2
    if "mixed" in args.parts:
        longest = max(longest, args.prompt + args.long // 2, args.long + 1)
    if "shared" in args.parts:
        longest = max(longest, args.long + 32 + args.tokens)
    return longest + 64


# -- parts with a server of their own


def turn(args: argparse.Namespace) -> dict[str, Any]:
    """A chat of ``2 * long`` tokens, its answer, and a second turn."""
    long, first, second = 2 * args.long, [], []
    with server(args, context=long + 256, slots=2) as port:
        for talk in prompts(args, 21, count=3, tokens=long):
            more = prompts(args, 22, count=1, tokens=24)[0]
            first.append(wave(args, port, [talk], 8, cache=True)["first_p50"])
            second.append(wave(args, port, [talk + more], 8, cache=True)["first_p50"])
    return {
        "tokens": long,
        "first_turn": first[-1],
        "second_turn": min(second),
        "share": min(second) / first[-1],
    }


def replicas(args: argparse.Namespace) -> dict[str, Any]:
    """One engine, then several, each with the same number of clients."""
    found = {}
    for count in (1, args.replicas):
        clients = count * args.clients
        with server(args, context=args.context, replicas=count, max_queue=clients) as port:
            waves = [
                wave(args, port, prompts(args, 30 + n, count=clients), args.tokens)
                for n in range(args.rounds + 1)
            ]
        found[count] = max(waves[1:], key=lambda w: w["tokens_per_second"])
    times = found[args.replicas]["tokens_per_second"] / found[1]["tokens_per_second"]
    return {"replicas": args.replicas, "one": found[1], "all": found[args.replicas], "times": times}


def front(args: argparse.Namespace) -> dict[str, Any]:
    """64 streams of an engine that costs nothing."""
    with server(args, context=4096, fake=True) as port:
        work = [[300, 301, 302] for _ in range(64)]
        wave(args, port, work, 64)
        found = wave(args, port, work, 512)
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
    if name == "turns":
        _serve_alone.turns(argparse.Namespace(**values))
        return
    print(json.dumps(getattr(_serve_alone, name)(argparse.Namespace(**values))))


def main() -> None:
    if sys.argv[1:2] == ["--child"]:
        child(*sys.argv[2:4])
        return
    args = parse()
    importlib.import_module("qwen3_moe_jax.serve.run")  # the extra [serve] is missed now, not after minutes
    args.vocabulary = vocabulary(args.model)
    args.context = context_of(args)
    figures = Figures(args)
    with_one_server(args, figures)
    for name, part in (("turn", turn), ("front", front), ("replicas", replicas)):
        if name in args.parts:
            figures.take(name, lambda part=part: part(args))
    print(json.dumps(figures.write()))


if __name__ == "__main__":
    main()
