"""Many sequences at once: the host's side of ``generate.DecodeState``.

A ``Batch`` holds a fixed number of slots. A scheduler fills them, calls ``step`` again and again, and frees
them; it decides which request comes first, and how long it may wait.
"""

from collections import deque
from collections.abc import Collection, Sequence

import jax
import numpy as np

from qwen3_moe_jax.core.batch import Progress
from qwen3_moe_jax.core.errors import BatchFullError, ModelClosedError
from qwen3_moe_jax.core.lookup import size_of
from qwen3_moe_jax.core.sampling import Sampling
from qwen3_moe_jax.jax_backend import draft_step, generate, one_token, rows, slots
from qwen3_moe_jax.jax_backend.asked import Asked, Written, merged, prompt_arrays
from qwen3_moe_jax.jax_backend.decode_path import Decoder
from qwen3_moe_jax.jax_backend.generate import (
    MAX_STEPS,
    PREFILL_TOKENS,
    DecodeState,
    StepResult,
)
from qwen3_moe_jax.jax_backend.kv_cache import KVCache
from qwen3_moe_jax.jax_backend.params import Params
from qwen3_moe_jax.jax_backend.preparation import Preparation
from qwen3_moe_jax.jax_backend.reading import Reader
from qwen3_moe_jax.jax_backend.settings import own_settings
from qwen3_moe_jax.jax_backend.step_sizes import check_invariant, row_counts
from qwen3_moe_jax.jax_backend.token_choice import WIDE, SamplingArrays, work_for

TOKENS_PER_DISPATCH = 8
"""Tokens per dispatch of ``run_all`` when nobody waits for a slot."""


class Batch:
    """Slots for sequences that share every forward pass.

    One thread at a time may call its methods; different batches of one model may have different threads.

    Attributes:
      slots: how many.
      capacity: tokens that a sequence may have, prompt and output.
      is_invariant: prompts are read one at a time, in chunks that depend on the prompt alone.
      read_tokens: of prompts, in the last step.
    """

    is_invariant = False
    read_tokens = 0

    @own_settings()
    def __init__(
        self,
        decoder: Decoder,
        params: Params,
        state: DecodeState,
        preparation: Preparation | None = None,
    ):
        """Takes slots, which this batch owns from now on.

        Args:
          decoder, params: the network; ``params`` are shared, not copied.
          state: ``generate.empty_state``, whose cache has room for the longest of
            ``generate.PREFILL_CHUNKS`` behind ``capacity`` positions.
          preparation: makes the programs of these slots in the background.
        """
        self.slots, self.capacity = state.cache.k.shape[1], state.capacity
        self._decoder, self._params, self._state = decoder, params, state
        self.preparation = preparation or Preparation([])
        self._has_kernel = decoder.has_kernel
        self._sequences: dict[int, Written] = {}
        self._asked: deque[Asked] = deque()
        self._closed = False
        self._reader = Reader(decoder, params, self.slots)

    def close(self) -> None:
        """Deletes the cache and all else on the device; later calls raise ModelClosedError."""
        self._closed = True
        self.preparation.close()
        self._sequences, self._params = {}, {}
        self._reader.close()
        self._asked.clear()
        for array in jax.tree.leaves(self._state):
            if not array.is_deleted():
                array.delete()

    def keep_invariant(self) -> None:
        """From now on a sequence has the same bits alone and in any company (``is_invariant``).

        Raises:
          BackendUnavailableError: what writes tokens of so many slots depends on how many there are.
        """
        is_one_launch = all(map(self._decoder.is_one_launch, row_counts(self.slots)))
        check_invariant(self.slots, has_kernel=self._has_kernel, is_one_launch=is_one_launch)
        self.is_invariant = True

    def make_programs(self) -> None:
        """Makes all programs that steps can need, and returns when they are there."""
        self.preparation.make_all()

    def load_programs(self) -> None:
        """Takes those that are on disk into memory, and returns when they are there."""
        self.preparation.load_stored()

    def use_ready_programs(self) -> None:
        """From now on no step waits for a program that reads several prompts: until it was made beside the
        work, which waits for a pause, they are read one by one. Where nothing is made so, nothing changes."""
        if self.preparation.makes_the_rest:
            self._reader.use_ready_programs()

    def _check_open(self) -> None:
        if self._closed:
            raise ModelClosedError

    @property
    def free_slots(self) -> int:
        """How many sequences could be admitted now."""
        return self.slots - len(self._sequences)

    @property
    def lowest_free(self) -> int | None:
        """The free slot that ``admit`` would take, or None."""
        return min(set(range(self.slots)) - self._sequences.keys(), default=None)

    @property
    def waiting(self) -> int:
        """How many sequences have prompts that are not read to their end."""
        return sum(sequence.is_waiting for sequence in self._sequences.values())

    @property
    def is_whole(self) -> bool:
        """False after a step that failed on the device (out of memory, say) and took the state with it."""
        return not any(x.is_deleted() for x in jax.tree.leaves(self._state))

    @own_settings()
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
        """Takes a prompt into a free slot; the next steps read it and write after it.

        Args:
          token_ids: the prompt, at least one token.
          sampling: None is greedy.
          max_tokens: at most this many new tokens; None fills the capacity.
          stop_ids: tokens that end the sequence.
          slot: a free one to take; None is the lowest.
          filled: so many tokens of the prompt are in that slot's row already (``row_length``, ``copy_row``,
            ``load_row``); fewer than the prompt has.
          written: so many of the last tokens were written, in another slot: penalties count them as output.
          mask: the tokens that may come first, as for ``allow``; None allows all, always.
          top_logprobs: ``Progress.scores`` are wanted, with so many rivals; at most ``MAX_TOP``.

        Returns:
          The slot, the lowest that is free, until ``free`` gives it back.

        Raises:
          BatchFullError: every slot is taken.
          ContextOverflowError: the prompt leaves no room for a token.
          ValueError: an empty prompt, max_tokens below 1, an id that is not in the vocabulary, a slot that
            is taken, ``filled`` or ``written`` out of range.
        """
        self._check_open()
        vocab_size = self._decoder.model.config.vocab_size
        tokens, is_stop = prompt_arrays(token_ids, max_tokens, stop_ids, self.capacity, vocab_size)
        if not self.free_slots:
            raise BatchFullError(self.slots)
        free = set(range(self.slots)) - self._sequences.keys()
        slot = min(free) if slot is None else slot
        if slot not in free:
            raise ValueError(f"slot {slot} is not free")
        if not 0 <= filled < len(token_ids):
            raise ValueError(f"filled is {filled}, and the prompt has {len(token_ids)} tokens")
        if not 0 <= written < len(token_ids):
            raise ValueError(f"written is {written}, and there are {len(token_ids)} tokens")
        limit = min(len(token_ids) + (max_tokens or self.capacity), self.capacity)
        numbers = (np.int32(n) for n in (len(token_ids), limit))
        sampling = sampling or Sampling()
        settings = SamplingArrays.of([sampling])
        reused = (
            np.int32(filled),
            np.int32(written),
            self._bits(mask or b""),
            np.asarray(mask is not None),
        )
        self._state = slots.admit(self._state, np.int32(slot), tokens, *numbers, is_stop, settings, *reused)
        stops, is_masked = frozenset(stop_ids), mask is not None
        self._sequences[slot] = Written(
            len(token_ids),
            limit,
            stops,
            work_for(sampling),
            filled=filled,
            is_masked=is_masked,
            top=top_logprobs,
        )
        return slot

    def _bits(self, mask: bytes) -> np.ndarray:
        """A mask as int32 [ceil(V / 32)]; what it lacks is not allowed."""
        bits = np.zeros(self._state.allowed.shape[1], np.int32)
        given = np.frombuffer(mask, "<i4")[: len(bits)]
        bits[: len(given)] = given
        return bits

    def allow(self, slot: int, mask: bytes) -> None:
        """Lets a masked sequence write its next token.

        Args:
          slot: its slot, admitted with a mask.
          mask: bit i % 8 of byte i // 8 is set where token i may come; whole groups of 4 bytes.

        Raises:
          KeyError: there is no sequence in this slot.
        """
        sequence = self._sequences[slot]
        self._state = rows.allow(self._state, np.int32(slot), self._bits(mask))
        sequence.is_held = False

    @property
    def running(self) -> int:
        """How many sequences have not ended."""
        return sum(s.finish_reason is None for s in self._sequences.values())

    @property
    def is_held(self) -> bool:
        """Whether a step would do nothing until ``allow`` is called."""
        running = [s for s in self._sequences.values() if s.finish_reason is None]
        return bool(running) and not self._asked and all(s.is_held for s in running)

    def left(self, slot: int) -> int:
        """Tokens that the sequence in this slot may still get, those that were asked for included."""
        return self._sequences[slot].limit - self._sequences[slot].length

    def room(self, slot: int) -> int:
        """Tokens that a sequence in this slot may have."""
        return self.capacity

    def row_length(self, slot: int) -> int:
        """Tokens of a slot's sequence that its row of the cache holds.

        Raises:
          KeyError: there is no sequence in this slot.
        """
        return self._sequences[slot].filled

    def sound_length(self, slot: int) -> int:
        """As ``row_length``; 0 for no sequence, or one whose logits were not finite."""
        sequence = self._sequences.get(slot)
        return 0 if sequence is None or sequence.finish_reason == "nonfinite" else sequence.filled

    def row_nbytes(self, length: int) -> int:
        """Bytes that ``save_row`` takes for so many positions."""
        return rows.nbytes(self._state.cache, length)

    def copy_row(self, source: int, target: int, length: int) -> None:
        """Copies the first positions of one slot's row, which may be running, to a free slot's."""
        self._check_free(target)
        numbers = (np.int32(source), np.int32(target))
        self._state = rows.copy(self._state, *numbers, length=rows.padded(self._state.cache, length))

    @property
    def positions(self) -> int:
        """Positions of a row of the cache: more than ``capacity``."""
        return self._state.cache.length

    def cut_row(self, slot: int, length: int, maximum: int | None = None) -> KVCache:
        """The first positions of a slot's row, on the device; not more than ``maximum`` of them."""
        padded = rows.padded(self._state.cache, length)
        return rows.cut(self._state.cache, np.int32(slot), length=min(padded, maximum or padded))

    def save_row(self, slot: int, length: int) -> KVCache:
        """The first positions of a slot's row, in main memory."""
        return jax.device_get(self.cut_row(slot, length))

    def load_row(self, slot: int, saved: KVCache) -> None:
        """Puts what ``save_row`` or ``cut_row`` gave, here or in another batch, into a free slot's row."""
        self._check_free(slot)
        if saved.length > self.positions:
            saved = jax.tree.map(lambda x: x[:, :, : self.positions], saved)
        self._state = rows.paste(self._state, np.int32(slot), saved)

    def _check_free(self, slot: int) -> None:
        self._check_open()
        if slot in self._sequences:
            raise ValueError(f"slot {slot} is not free")

    @own_settings()
    def free(self, slot: int) -> None:
        """Gives a slot back, at any time: a sequence that has not ended is given up.

        Raises:
          KeyError: there is no sequence in this slot.
        """
        self._check_open()
        sequence = self._sequences.pop(slot)
        if sequence.finish_reason == "nonfinite":
            self._state = slots.clear(self._state, np.int32(slot))
        self._state = slots.release(self._state, np.int32(slot))

    def free_all(self) -> None:
        """Gives every slot back."""
        for slot in list(self._sequences):
            self.free(slot)

    @own_settings()
    def step(self, tokens: int = 1, *, prompt_tokens: int = PREFILL_TOKENS, ahead: int = 0) -> list[Progress]:
        """Goes on with every sequence that has not ended.

        While prompts are waiting, a chunk of the oldest ones is read and every sequence that is ready gets a
        token: in one forward pass, or on a GPU whose decode kernel runs in two programs one after the other,
        so that company changes no bit of what is written. Otherwise those write ``tokens`` tokens each, in
        one dispatch.

        Args:
          tokens: 1 to ``generate.MAX_STEPS``.
          prompt_tokens: about how much is read in this step, which the sequences that are written
            wait for; the shortest chunk of one prompt at least; 0 reads none.
          ahead: 0 to ``generate.MAX_STEPS``. If this is not 0 and a GPU's decode kernel runs, the device has
            always work: it is asked for the next step, of so many tokens, before this one's results are
            waited for, and what it writes after prompts is waited for in the next call. What is admitted
            meanwhile comes after it.

        Returns:
          One entry for each sequence that has new tokens or has ended, by slot.
        """
        self._check_open()
        for count, minimum in ((tokens, 1), (ahead, 0)):
            if not minimum <= count <= MAX_STEPS:
                raise ValueError(f"a step writes {minimum} to {MAX_STEPS} tokens, not {count}")
        with self.preparation.working():
            asked = self._ask(tokens, prompt_tokens, ahead)
            progress = merged([p for program in asked for p in self._take(program)])
        if progress:
            self.preparation.go_on()
        return progress

    def _ask(self, tokens: int, prompt_tokens: int, ahead: int) -> list[Asked]:
        """Asks the device for a step; gives what is to be waited for now, not what runs beside the host."""
        may_wait = bool(ahead) and self._may_wait
        self.read_tokens = 0
        waiting = [slot for slot, sequence in self._sequences.items() if sequence.is_waiting]
        if waiting and prompt_tokens:
            self._read_prompts(waiting, prompt_tokens)
            is_left = may_wait and self._asked[-1].is_decode
        else:
            if not self._asked:
                self._decode(tokens)
            is_left = may_wait and bool(self._asked) and self._decode(ahead)
        return [self._asked.popleft() for _ in range(len(self._asked) - is_left)]

    @property
    def _may_wait(self) -> bool:
        """Whether the device may be asked for tokens before the last ones are known: not where a mask must
        come first, or asking waits for them: sampling of the whole vocabulary does (``generate.decode``)."""
        sequences = self._sequences.values()
        return self._has_kernel and not any(s.work == WIDE or s.is_masked for s in sequences)

    def _decode(self, tokens: int) -> bool:
        """Asks for tokens of all that have room for one, if there are any."""
        writers = [slot for slot, sequence in self._sequences.items() if sequence.is_writable]
        if not writers:
            return False
        rows = next(n for n in row_counts(self.slots) if n > max(writers))
        given = self._decoder, self._params, self._state
        if tokens == 1 and self._may_wait and not self._is_scored and not self._decoder.is_one_launch(rows):
            work = max(self._sequences[slot].work for slot in writers)
            self._state, result = one_token.decode_one(*given, rows=rows, work=work)
        else:
            self._state, result = generate.decode(*given, np.int32(tokens), rows=rows, scored=self._is_scored)
        self._note(result, dict.fromkeys(writers, tokens), is_decode=True)
        return True

    @property
    def is_behind(self) -> bool:
        """Whether the device has been asked for tokens that are not known yet."""
        return bool(self._asked)

    @own_settings()
    def write_draft(self, slot: int, draft: Sequence[int]) -> list[Progress]:
        """Writes what is right of a draft, and a token more (``draft_step.write_draft``).

        The slot is the batch's only one; its sequence has no mask and is being written, and nothing that the
        device was asked for is not known.
        """
        size = size_of(len(draft))
        padded = np.asarray([*draft, *[0] * (size - len(draft))], np.int32)
        with self.preparation.working():
            given = self._decoder, self._params, self._state
            self._state, result = draft_step.write_draft(*given, padded, np.int32(len(draft)))
            self._note(result, {slot: len(draft) + 1}, is_decode=True)
            return self._take(self._asked.popleft())

    def _read_prompts(self, waiting: list[int], maximum: int) -> None:
        """Asks for a chunk of the oldest prompts, and a token of the sequences that are ready."""
        if self.is_invariant:
            waiting, maximum = waiting[:1], PREFILL_TOKENS
        remaining = {slot: self._sequences[slot].length - self._sequences[slot].filled for slot in waiting}
        scored = self._is_scored
        chunk, count = self._reader.choose(self._state, list(remaining.values()), maximum, is_scored=scored)
        slots = waiting[:count]
        beside = [] if self._has_kernel else [n for n, s in self._sequences.items() if s.is_ready]
        self._state, result = self._reader.read(self._state, slots, chunk, is_scored=scored)
        self.read_tokens = chunk * len(slots)
        for slot in slots:
            self._sequences[slot].filled += min(chunk, remaining[slot])
        ended = [slot for slot in slots if remaining[slot] <= chunk]
        self._note(result, dict.fromkeys([*beside, *ended], 1))
        for slot in ended:  # as on the device: until its next mask
            self._sequences[slot].is_held = self._sequences[slot].is_masked
        if self._has_kernel:
            self._decode(1)

    def _note(self, result: StepResult, tokens: dict[int, int], *, is_decode: bool = False) -> None:
        for slot, count in tokens.items():
            self._sequences[slot].asked += count
        self._asked.append(Asked(result, dict(self._sequences), tokens, is_decode))

    @property
    def _is_scored(self) -> bool:
        """Whether some sequence that has not ended wants scores."""
        return any(s.top is not None for s in self._sequences.values() if s.finish_reason is None)

    def _take(self, asked: Asked) -> list[Progress]:
        """Notes what a program has done, and says it."""
        result = jax.device_get(asked.result)
        for slot, count in asked.tokens.items():
            asked.sequences[slot].asked -= count
        progress = []
        for slot, sequence in sorted(asked.sequences.items()):
            if sequence.finish_reason or self._sequences.get(slot) is not sequence:
                continue  # it ended in the program before, or was given up, when this one had begun
            if (said := sequence.took(result, slot)) is not None:
                progress.append(said)
        return progress
