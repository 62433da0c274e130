"""A batch without a model, for tests of the scheduler: tokens are a function of the prompt and the place."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

from qwen3_moe_jax.core.batch import FinishReason, Progress
from qwen3_moe_jax.core.errors import BatchFullError
from qwen3_moe_jax.core.sampling import Sampling

CHUNK = 16


@dataclass
class _Sequence:
    tokens: list[int]
    limit: int
    filled: int
    mask: bytes | None
    first: int
    is_held: bool = False
    finish_reason: FinishReason | None = None

    @property
    def is_waiting(self) -> bool:
        return self.finish_reason is None and self.filled < len(self.tokens) - 1


def next_token(tokens: Sequence[int]) -> int:
    """What the fake model writes after these."""
    return (sum(tokens[-3:]) * 31 + len(tokens)) % 241


@dataclass
class FakeBatch:
    """As ``jax_backend.batching.Batch``; a row that claims to hold a prefix that it does not is an error.

    Attributes:
      says: what every sequence writes before it stops; empty: ``next_token``, to its limit.
      chunk: tokens of a prompt that a step reads.
      rooms: of each slot, the tokens that it holds, where rows have several lengths.
      read_tokens, read_in_all: of prompts, in the last step and since the start.
      fails_at: numbers of steps that raise; ``breaks`` says whether they take the state with them.
    """

    slots: int = 4
    capacity: int = 256
    rooms: tuple[int, ...] = ()
    says: tuple[int, ...] = ()
    chunk: int = CHUNK
    fails_at: frozenset[int] = frozenset()
    breaks: bool = False
    is_whole: bool = True
    steps: int = 0
    rows: dict[int, list[int]] = field(default_factory=dict)
    sequences: dict[int, _Sequence] = field(default_factory=dict)
    read_tokens: int = 0
    read_in_all: int = 0

    def __post_init__(self):
        self.rooms = self.rooms or (self.capacity,) * self.slots
        self.slots, self.capacity = len(self.rooms), max(self.rooms)

    @property
    def running(self) -> int:
        return sum(s.finish_reason is None for s in self.sequences.values())

    @property
    def is_held(self) -> bool:
        running = [s for s in self.sequences.values() if s.finish_reason is None]
        return bool(running) and all(s.is_held for s in running)

    def room(self, slot: int) -> int:
        """Tokens that a sequence in this slot may have."""
        return self.rooms[slot]

    @property
    def free_slots(self) -> int:
        return self.slots - len(self.sequences)

    @property
    def waiting(self) -> int:
        return sum(s.is_waiting for s in self.sequences.values())

    def admit(
        self,
        token_ids: Sequence[int],
        *,
        sampling: Sampling | None = None,
        max_tokens: int | None = None,
        stop_ids: Collection[int] = (),
        slot: int | None = None,
        filled: int = 0,
        written: int = 0,
        mask: bytes | None = None,
        top_logprobs: int | None = None,
    ) -> int:
        """Takes a prompt; ``filled`` of its tokens must be in the row already."""
        if not self.free_slots:
            raise BatchFullError(self.slots)
        slot = min(set(range(self.slots)) - self.sequences.keys()) if slot is None else slot
        assert slot not in self.sequences
        assert filled < len(token_ids) < self.rooms[slot]
        assert written < len(token_ids)
        assert self.rows.get(slot, [])[:filled] == list(token_ids[:filled]), "a prefix that is not there"
        limit = min(len(token_ids) + (max_tokens or self.capacity), self.rooms[slot])
        self.sequences[slot] = _Sequence(list(token_ids), limit, filled, mask, len(token_ids) - written)
        self.rows[slot] = list(token_ids[:filled])
        return slot

    def make_programs(self) -> None:
        """Does nothing: it has none."""

    load_programs = use_ready_programs = make_programs

    def free(self, slot: int) -> None:
        """Gives a slot back; its row stays."""
        del self.sequences[slot]

    def row_length(self, slot: int) -> int:
        """Tokens that a row holds."""
        return len(self.rows.get(slot, []))

    def row_nbytes(self, length: int) -> int:
        """Bytes of so many positions."""
        return 100 * length

    def copy_row(self, source: int, target: int, length: int) -> None:
        """The first positions of one row to another."""
        assert target not in self.sequences
        assert length <= self.rooms[target]
        self.rows[target] = self.rows[source][:length]

    def save_row(self, slot: int, length: int) -> list[int]:
        """A row's positions."""
        return self.rows[slot][:length]

    def load_row(self, slot: int, saved: list[int]) -> None:
        """What ``save_row`` gave, into a row."""
        assert slot not in self.sequences
        self.rows[slot] = list(saved)[: self.rooms[slot]]

    def allow(self, slot: int, mask: bytes) -> None:
        """Lets a masked sequence go on."""
        self.sequences[slot].mask, self.sequences[slot].is_held = mask, False

    def step(self, tokens: int = 1, *, prompt_tokens: int = CHUNK, ahead: int = 0) -> list[Progress]:
        """Reads a chunk of the oldest prompt, and writes."""
        self.steps += 1
        if self.steps in self.fails_at:
            self.is_whole = not self.breaks
            raise RuntimeError("a step that fails")
        waiting = [slot for slot, s in self.sequences.items() if s.is_waiting]
        ready = [slot for slot, s in self.sequences.items() if not s.is_waiting and not s.is_held]
        self.read_tokens = 0
        if waiting:
            self._read(waiting[0], prompt_tokens)
        count = 1 if waiting else tokens
        found = [self._write(slot, count) for slot in sorted(ready) if not self.sequences[slot].finish_reason]
        return found

    def _read(self, slot: int, maximum: int) -> None:
        s = self.sequences[slot]
        end = min(s.filled + min(maximum, self.chunk), len(s.tokens) - 1)
        self.read_tokens = end - s.filled
        self.read_in_all += self.read_tokens
        self.rows[slot] += s.tokens[s.filled : end]
        s.filled = end

    def _write(self, slot: int, count: int) -> Progress:
        s, new = self.sequences[slot], []
        for _ in range(1 if s.mask is not None else count):
            self.rows[slot].append(s.tokens[s.filled])
            s.filled += 1
            at = len(s.tokens) - s.first
            if self.says and at == len(self.says):
                s.finish_reason = "stop"
                break
            new.append(self.says[at] if self.says else next_token(s.tokens))
            s.tokens.append(new[-1])
            if len(s.tokens) >= s.limit:
                s.finish_reason = "length"
                break
        s.is_held = s.mask is not None
        return Progress(slot, new, s.finish_reason)
