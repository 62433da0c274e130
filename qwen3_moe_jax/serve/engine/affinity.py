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

TOKENS_PER_SEQUENCE = 256
"""To read so many tokens again is thought to cost as much as one more sequence beside the others."""

BLOCK_BYTES = 4 * UNIT
"""Of token ids, and of text that is not tokenised yet: a token has about four bytes."""


def blocks_of(token_ids: Sequence[int], scope: str | None) -> list[int]:
    """Hashes of a prompt's whole blocks, each with all before it; none where nothing is shared."""
    return blocks_of_bytes(np.asarray(token_ids, np.int32).tobytes(), scope)


def blocks_of_bytes(values: bytes, scope: str | None) -> list[int]:
    """As ``blocks_of``, of a prompt that is bytes: token ids, or its text."""
    if scope is None:
        return []
    found, last = [], hash(scope)
    for end in range(BLOCK_BYTES, len(values) + 1, BLOCK_BYTES):
        last = hash((last, values[end - BLOCK_BYTES : end]))
        found.append(last)
    return found


def worth(tokens: int) -> int:
    """Sequences that an engine may have more than another one, if it has so many tokens of a prompt."""
    return 1 + tokens // TOKENS_PER_SEQUENCE if tokens else 0


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
