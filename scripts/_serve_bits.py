"""Whether a server's answers depend on who else is served, and on prefixes that are in the cache already."""

import argparse
import asyncio
import json
from collections.abc import Sequence
from typing import Any

from scripts._load_generator import within

STYLES: tuple[dict[str, Any], ...] = (
    {"temperature": 0},
    {"temperature": 0.8, "top_k": 20, "seed": 5},
    {"temperature": 1.0, "seed": 6},
)
COUNT = 9
"""Prompts that are compared: three of each style."""


async def say(port: int, ids: list[int], tokens: int, style: dict[str, Any], *, cache: bool) -> str:
    """The text of a completion that does not stream."""
    body = json.dumps({"prompt": ids, "max_tokens": tokens, "cache_prompt": cache, **style}).encode()
    reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=1 << 22)
    try:
        head = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n"
        writer.write(
            head + b"Content-Type: application/json\r\nContent-Length: %d\r\n\r\n" % len(body) + body
        )
        _, _, content = (await reader.read()).partition(b"\r\n\r\n")
    finally:
        writer.close()
    answer = json.loads(content)
    if "choices" not in answer:
        raise RuntimeError(answer.get("error", answer))
    return answer["choices"][0]["text"]


def compare(args: argparse.Namespace, port: int, work: Sequence[list[int]]) -> dict[str, Any]:
    """How many of ``COUNT`` answers are as each was alone: beside one another, among all clients, with what
    rows hold already, and once more alone. ``work`` has a prompt for each client."""
    compared = [(ids, STYLES[i % len(STYLES)]) for i, ids in enumerate(work[:COUNT])]
    tokens = args.tokens // 2

    async def one_by_one(cache: bool) -> list[str]:
        return [await say(port, ids, tokens, style, cache=cache) for ids, style in compared]

    async def together(others: Sequence[list[int]]) -> list[str]:
        mine = [say(port, ids, tokens, style, cache=False) for ids, style in compared]
        beside = [say(port, ids, tokens, {"temperature": 0}, cache=False) for ids in others]
        return (await asyncio.gather(*mine, *beside))[: len(compared)]

    run = lambda coroutine: asyncio.run(within(args.part_seconds, coroutine))
    alone = run(one_by_one(False))
    same = lambda found: sum(a == b for a, b in zip(found, alone, strict=True))
    run(one_by_one(True))  # leaves what the next ones find
    return {
        "answers": len(alone),
        "different_answers": len(set(alone)),
        "tokens": tokens,
        "same_again": same(run(one_by_one(False))),
        "same_beside_one_another": same(run(together([]))),
        "same_among_all": same(run(together(work[COUNT:]))),
        "same_from_the_cache": same(run(one_by_one(True))),
    }
