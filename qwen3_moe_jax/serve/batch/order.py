"""The order in which requests are answered: what begins alike together, long work first.

Requests that share their beginning follow each other, so that the prefix cache has it when they come. Long
ones come first, so that the last slots do not wait for one that began late; neighbours are of like length,
so that their prompts are read together.
"""

from collections.abc import Iterable

from qwen3_moe_jax.serve.batch.lines import NO_LIMIT, Line

SHARED = 400
"""Characters that two prompts begin with alike to be of one family: about a hundred tokens. A chat
template's own beginning is no reason to stand together."""

BYTES_PER_TOKEN = 4


def size(line: Line) -> int:
    """About how many tokens a request reads and may write; an order of sizes, not a count."""
    return len(line.body) // BYTES_PER_TOKEN + (NO_LIMIT if line.limit is None else line.limit)


def ordered(lines: Iterable[Line]) -> list[Line]:
    """The lines in the order in which they are answered; ties keep the file's order."""
    families: list[list[Line]] = []
    for line in sorted(lines, key=lambda line: (line.order, line.number)):
        if families and _are_alike(families[-1][-1], line):
            families[-1].append(line)
        else:
            families.append([line])
    families.sort(key=lambda family: (-max(map(size, family)), family[0].number))
    return [line for family in families for line in family]


def _are_alike(a: Line, b: Line) -> bool:
    return len(a.order) >= SHARED and a.order[:SHARED] == b.order[:SHARED]
