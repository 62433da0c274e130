"""Clients that ask a server for completions, on sockets of their own in one event loop, and note times."""

import argparse
import asyncio
import json
import time
from collections.abc import Coroutine
from typing import Any, TypeVar

T = TypeVar("T")


async def within(seconds: float, work: Coroutine[Any, Any, T]) -> T:
    """What it gives, if it takes no longer.

    Raises:
      TimeoutError: it takes longer.
    """
    async with asyncio.timeout(seconds):
        return await work


async def ask(
    port: int, ids: list[int], tokens: int, *, cache: bool = False, times: list[float] | None = None
) -> dict[str, Any]:
    """One streamed completion: when its events came (also in ``times``, as they come), how many tokens, or
    the status of a refusal and the seconds to it from when all had been sent. Who cancels it goes away."""
    times = [] if times is None else times
    body = {"prompt": ids, "max_tokens": tokens, "temperature": 0, "stream": True, "cache_prompt": cache}
    content = json.dumps({**body, "stream_options": {"include_usage": True}}).encode()
    began = time.perf_counter()
    reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=1 << 22)
    try:
        status, usage, refused = await _events(reader, writer, content, times)
    finally:
        writer.close()
    found: dict[str, Any] = {"status": status, "seconds": refused}
    if status == 200 and times:
        found |= {"first": times[0] - began, "tokens": usage.get("completion_tokens", 0), "times": times}
        found["cached"] = usage.get("prompt_tokens_details", {}).get("cached_tokens", 0)
    return found


async def _events(
    reader: asyncio.StreamReader, writer: asyncio.StreamWriter, content: bytes, times: list[float]
) -> tuple[int, dict[str, Any], float]:
    """The status, the usage of an answer, and the seconds to the status."""
    head = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n"
    writer.write(
        head + b"Content-Type: application/json" + b"\r\nContent-Length: %d\r\n\r\n" % len(content) + content
    )
    sent = time.perf_counter()
    status = int((await reader.readline()).split()[1])
    seconds = time.perf_counter() - sent
    usage: dict[str, Any] = {}
    while line := await reader.readline():
        if line.startswith(b"data: {"):
            if b'"choices":[]' in line:
                usage = json.loads(line[6:])["usage"]
            else:
                times.append(time.perf_counter())
    return status, usage, seconds


def quantile(values: list[float], share: float) -> float | None:
    """The value below which this share of them lies."""
    return sorted(values)[min(len(values) - 1, int(share * len(values)))] if values else None


def wave(
    args: argparse.Namespace,
    port: int,
    work: list[list[int]],
    tokens: int,
    *,
    cache: bool = False,
    spread: float = 0.0,
) -> dict[str, Any]:
    """All of these at once, or one after the other within ``spread`` seconds."""

    async def later(number: int, ids: list[int]) -> dict[str, Any]:
        await asyncio.sleep(spread * number / len(work))
        return await ask(port, ids, tokens, cache=cache)

    async def main() -> tuple[list[dict[str, Any]], float]:
        began = time.perf_counter()
        found = await asyncio.gather(*(later(n, ids) for n, ids in enumerate(work)))
        return list(found), time.perf_counter() - began

    return _figures(*asyncio.run(within(args.part_seconds, main())))


def talks(args: argparse.Namespace, port: int, work: list[list[tuple[list[int], int]]]) -> dict[str, Any]:
    """Clients that each ask for these, prompts and numbers of tokens, one after the other."""

    async def talk(asks: list[tuple[list[int], int]]) -> list[dict[str, Any]]:
        return [await ask(port, ids, tokens) for ids, tokens in asks]

    async def main() -> tuple[list[dict[str, Any]], float]:
        began = time.perf_counter()
        found = await asyncio.gather(*map(talk, work))
        return [f for one in found for f in one], time.perf_counter() - began

    return _figures(*asyncio.run(within(args.part_seconds, main())))


def _figures(found: list[dict[str, Any]], seconds: float) -> dict[str, Any]:
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
