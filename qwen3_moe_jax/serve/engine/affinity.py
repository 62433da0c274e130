"""Where prompts were sent: what a front knows of the prefixes in an engine's cache, in little memory.

A prompt is cut into blocks of 16 tokens, and each block has a hash of itself and all before it. Who knows the
hashes of the blocks that an engine has read knows how much of a new prompt that engine need not read. The
idea is that of vLLM's automatic prefix caching (https://docs.vllm.ai/en/latest/design/prefix_caching.html)
and of SGLang's router. A hash that is wrong sends a prompt to another engine, which reads it: nothing else.
"""

from collections import OrderedDict
from collections.abc import Sequence

import numpy as np

from qwen3_moe_jax.serve.engine.prefix import UNIT


def blocks_of(token_ids: Sequence[int], scope: str | None) -> list[int]:
    """Hashes of a prompt's whole blocks, each with all before it; none where nothing is shared."""
    if scope is None:
        return []
    values = np.asarray(token_ids, np.int32).tobytes()
    found, last = [], hash(scope)
    for end in range(4 * UNIT, len(values) + 1, 4 * UNIT):
        last = hash((last, values[end - 4 * UNIT : end]))
        found.append(last)
    return found


class SentBlocks:
    """The blocks of the prompts that one engine has read last.

    Attributes:
      capacity: blocks that are remembered: as many as its rows hold.
    """

    def __init__(self, capacity: int = 0):
        self.capacity = capacity
        self._blocks: OrderedDict[int, None] = OrderedDict()  # least recently used first

    def add(self, blocks: Sequence[int]) -> None:
        """After a prompt was sent; a prompt's end is forgotten before its beginning."""
        for block in reversed(blocks):
            self._blocks[block] = None
            self._blocks.move_to_end(block)
        while len(self._blocks) > self.capacity:
            self._blocks.popitem(last=False)

    def match(self, blocks: Sequence[int]) -> int:
        """Tokens at the beginning of a prompt that are thought to be in the engine's cache."""
        count = next((i for i, block in enumerate(blocks) if block not in self._blocks), len(blocks))
        return count * UNIT

    def clear(self) -> None:
        """After the engine was lost."""
        self._blocks.clear()
