"""Several answers as one stream."""

import asyncio
from collections.abc import AsyncIterator, Sequence

from qwen3_moe_jax.serve.generation import Answer, Delta

Item = tuple[int, Delta | None]


async def merged(answers: Sequence[Answer]) -> AsyncIterator[Item]:
    """The deltas of all answers as they come, each with its answer's number; None is an answer's end."""
    if len(answers) == 1:  # without queue and task: nearly every request
        async for delta in answers[0]:
            yield 0, delta
        yield 0, None
        return
    ready: asyncio.Queue[Item | Exception] = asyncio.Queue(maxsize=64)
    tasks = [asyncio.ensure_future(_feed(i, a, ready)) for i, a in enumerate(answers)]
    try:
        left = len(tasks)
        while left:
            item = await ready.get()
            if isinstance(item, Exception):
                raise item
            left -= item[1] is None
            yield item
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _feed(number: int, answer: Answer, ready: asyncio.Queue) -> None:
    try:
        async for delta in answer:
            await ready.put((number, delta))
        await ready.put((number, None))
    except Exception as error:
        await ready.put(error)
