"""Generation as jitted programs on one state: prompts in chunks, and tokens in a loop on the device.

``DecodeState`` has a number of slots, each with a sequence of its own length, sampling
and end. ``decode`` writes a few tokens for all that are ready; ``prefill`` reads a chunk of
some prompts and may write one token for the others in the same forward pass. Everything that
changes is in the state, whose buffers are donated from call to call: no setting of a sequence
compiles anything. ``batching.Batch`` is the host's side.
"""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp

from qwen3_moe_jax.convert.config import Qwen3MoeConfig
from qwen3_moe_jax.core.sampling import Sampling
from qwen3_moe_jax.jax_backend.decode_path import Decoder
from qwen3_moe_jax.jax_backend.kv_cache import KVCache, Span
from qwen3_moe_jax.jax_backend.params import Params
from qwen3_moe_jax.jax_backend.programs import Program
from qwen3_moe_jax.jax_backend.sharding import Shards
from qwen3_moe_jax.jax_backend.token_choice import (
    GREEDY,
    NARROW,
    WIDE,
    SamplingArrays,
    allow_only,
    choose_tokens,
    work_of,
)
from qwen3_moe_jax.jax_backend.token_scores import MAX_TOP, TokenScores
from qwen3_moe_jax.jax_backend.trees import tree_dataclass

COMPILER_OPTIONS = {"xla_cpu_prefer_vector_width": 512}
"""One instruction for sixteen rows of weights on CPUs that have it; other platforms ignore it."""

PREFILL_CHUNKS = (16, 128, 512)
"""Lengths of a prefill chunk: a prompt is cut into these, so only these shapes are compiled."""

PREFILL_TOKENS = 2048
"""Tokens of prompts that a step reads unless asked otherwise: more rows would not use a GPU better."""

MAX_STEPS = 32
"""Tokens of a sequence that one dispatch writes at most."""

LAUNCHES = (2, 8, 32)
"""How often a dispatch launches the GPU's decode kernel: the minimum that does, up to MAX_STEPS. A loop of a
fixed number asks nothing of the host, and a kernel that has nothing to do ends at once. A loop of one would
be no loop to XLA, which then copies the cache."""


@tree_dataclass
class DecodeState:
    """B slots, each empty or with a sequence that is read or written.

    A sequence of n tokens is ready to be written when its first n - 1 are in the cache; the
    last one is the next step's input. What a step computes for a slot that is not ready (empty,
    finished, still reading its prompt) goes to the cache at position ``filled``, where whatever
    comes next overwrites it before it is seen.

    Attributes:
      cache: keys and values, S positions and room for one more chunk.
      tokens: int32 [B, S], prompt and output.
      length: int32 [B], tokens of each sequence.
      filled: int32 [B], how many of them are in the cache.
      limit: int32 [B], the length at which a sequence ends; at most S.
      finished: bool [B], ended (a stop token stays in ``tokens``), or the slot is empty.
      nonfinite: bool [B], its logits were NaN or infinite; such a sequence is finished.
      in_prompt: bool [B, V], tokens of the prompt.
      in_output: bool [B, V], tokens written since.
      is_stop: bool [B, V], tokens that end the sequence.
      sampling: of each sequence.
      allowed: int32 [B, ceil(V / 32)], bits of the tokens that a masked sequence may write next.
      masked: bool [B], whether ``allowed`` counts; such a sequence writes one token and is then held.
      held: bool [B], waits for its next ``allowed``.
    """

    cache: KVCache
    tokens: jax.Array
    length: jax.Array
    filled: jax.Array
    limit: jax.Array
    finished: jax.Array
    nonfinite: jax.Array
    in_prompt: jax.Array
    in_output: jax.Array
    is_stop: jax.Array
    sampling: SamplingArrays
    allowed: jax.Array
    masked: jax.Array
    held: jax.Array

    @classmethod
    def empty(cls, cache: KVCache, capacity: int, vocab_size: int) -> "DecodeState":
        """A slot without a sequence for each row of the cache; ``capacity`` is S."""
        batch = cache.k.shape[1]
        # every field a buffer of its own: each is donated
        counts = [jnp.zeros((batch,), jnp.int32) for _ in range(3)]
        masks = [jnp.zeros((batch, vocab_size), bool) for _ in range(3)]
        return cls(
            cache=cache,
            tokens=jnp.zeros((batch, capacity), jnp.int32),
            length=counts[0],
            filled=counts[1],
            limit=counts[2],
            finished=jnp.ones((batch,), bool),
            nonfinite=jnp.zeros((batch,), bool),
            in_prompt=masks[0],
            in_output=masks[1],
            is_stop=masks[2],
            sampling=SamplingArrays.of([Sampling()] * batch),
            allowed=jnp.zeros((batch, -(-vocab_size // 32)), jnp.int32),
            masked=jnp.zeros((batch,), bool),
            held=jnp.zeros((batch,), bool),
        )

    @property
    def capacity(self) -> int:
        """Tokens S that a sequence may have."""
        return self.tokens.shape[1]

    @property
    def ready(self) -> jax.Array:
        """bool [B], whether a slot's next step writes a token."""
        return ~self.finished & (self.filled == self.length - 1) & ~self.held


@tree_dataclass
class StepResult:
    """What the host wants to know after a step.

    Attributes:
      tokens: int32 [B, n], the tokens from the length before the step on.
      length: int32 [B], tokens of each sequence now.
      finished, nonfinite: bool [B].
      scores: of ``tokens``, [R, n] of the first R slots, where they were asked for.
    """

    tokens: jax.Array
    length: jax.Array
    finished: jax.Array
    nonfinite: jax.Array
    scores: TokenScores | None = None

    @classmethod
    def of(
        cls, state: DecodeState, before: jax.Array, maximum: int, scores: TokenScores | None = None
    ) -> "StepResult":
        """``before``: the lengths int32 [B] that ``maximum`` tokens may have been added to."""
        columns = jnp.minimum(before[:, None] + jnp.arange(maximum), state.capacity - 1)
        tokens = jnp.take_along_axis(state.tokens, columns, axis=1)
        return cls(tokens, state.length, state.finished, state.nonfinite, scores)


def chunk_lengths(num_tokens: int, sizes: Sequence[int] = PREFILL_CHUNKS) -> list[int]:
    """Chunks that cover a prompt: the longest while they fit, then the shortest that holds the rest."""
    lengths, largest = [], max(sizes)
    while num_tokens > 0:
        lengths.append(largest if num_tokens >= largest else min(c for c in sizes if c >= num_tokens))
        num_tokens -= lengths[-1]
    return lengths


@partial(Program, static_argnames=("config", "slots", "length", "capacity", "dtype", "shards"))
def empty_state(
    config: Qwen3MoeConfig, slots: int, length: int, capacity: int, dtype: str, shards: Shards | None = None
) -> DecodeState:
    """``slots`` empty slots with ``length`` positions of cache, for sequences of ``capacity`` tokens.

    A program like the others: JAX would compile one for each of the arrays otherwise, in every process.
    """
    heads = shards.cache_heads if shards else None
    cache = KVCache.create(config, slots, length, jnp.dtype(dtype), heads=heads)
    return DecodeState.empty(cache, capacity, config.vocab_size)


def append_tokens(
    state: DecodeState,
    rows: jax.Array,
    logits: jax.Array,
    writes: jax.Array,
    scores: TokenScores | None = None,
) -> tuple[DecodeState, TokenScores | None]:
    """Chooses the next token of some slots and writes it down, and its score into ``scores`` [B, 1].

    Args:
      rows: int32 [W], slots; one that is named twice may write once.
      logits: float32 [W, V].
      writes: bool [W], whether this row is meant.
    """
    sampling = jax.tree.map(lambda x: x[rows], state.sampling)
    length = state.length[rows]
    masks = lambda: (state.in_prompt[rows], state.in_output[rows])
    masked = state.masked[rows]
    allowed = allow_only(logits, state.allowed[rows], masked)
    token, finite = choose_tokens(allowed, sampling, length, masks)
    bad = writes & ~finite
    writes = writes & ~bad
    where = jnp.where(writes, length, state.capacity)  # an index past the end is dropped
    ends = state.is_stop[rows, token] | (length + 1 >= state.limit[rows])
    if scores is not None:
        found = jax.tree.map(lambda x: x[:, None], TokenScores.of(logits, token))
        scores = scores.put(jnp.where(writes, rows, len(state.length)), found)
    state = replace(
        state,
        tokens=state.tokens.at[rows, where].set(token, mode="drop"),
        length=state.length.at[rows].add(writes),
        finished=state.finished.at[rows].max(bad | (writes & ends)),
        nonfinite=state.nonfinite.at[rows].max(bad),
        in_output=state.in_output.at[rows, token].max(writes),
        held=state.held.at[rows].max(writes & masked),
    )
    return state, scores


def last_tokens(state: DecodeState, rows: int) -> jax.Array:
    """int32 [rows, 1], what the first slots decode: their tokens at position ``filled``."""
    return jnp.take_along_axis(state.tokens[:rows], state.filled[:rows, None], axis=1)


@tree_dataclass
class LoopState:
    """What changes from token to token while B sequences are written; little, for a GPU launches a kernel
    for nearly each of these.

    Attributes:
      cache: keys and values.
      in_output: bool [slots, V], as in DecodeState.
      step: int32, tokens since the dispatch began.
      written: int32 [MAX_STEPS, B], the first ``count[b]`` of them are sequence b's.
      last: int32 [B], the next inputs.
      count: int32 [B].
      active: bool [B], whether the next step writes a token.
      finished, nonfinite: bool [B], ended in this dispatch, and so because of its logits.
      scores: [MAX_STEPS, B] of ``written``, where they were asked for.
    """

    cache: KVCache
    in_output: jax.Array
    step: jax.Array
    written: jax.Array
    last: jax.Array
    count: jax.Array
    active: jax.Array
    finished: jax.Array
    nonfinite: jax.Array
    scores: TokenScores | None = None


@partial(jax.jit, static_argnames="decoder")
def _decode_logits(
    decoder: Decoder, params: Params, tokens: jax.Array, start: jax.Array, active: jax.Array, cache: KVCache
) -> tuple[jax.Array, KVCache]:
    """Logits float32 [B, V] after one token of each sequence, int32 [B] at position ``start`` [B].

    A jitted function of its own, so that a program that calls it in several loops has one GPU kernel.
    """
    step = decoder.step(params, tokens[:, None], start, cache, active=active)
    return step.logits[:, 0], step.cache


def write_tokens(
    decoder: Decoder,
    params: Params,
    state: DecodeState,
    steps: jax.Array,
    now: LoopState,
    work: int | None = None,
    launches: int | None = None,
) -> LoopState:
    """The loop of ``decode``: every setting is ``state``'s, which it does not change.

    Args:
      work: of ``choose_tokens``.
      launches: runs the step so often, at least ``steps`` times; None: until there is nothing to write.
    """
    rows = len(now.last)
    slots = jnp.arange(rows)
    start, length, limit = state.filled[:rows], state.length[:rows], state.limit[:rows]
    masked = state.masked[:rows]
    sampling = jax.tree.map(lambda x: x[:rows], state.sampling)

    def step(now: LoopState) -> LoopState:
        logits, cache = _decode_logits(decoder, params, now.last, start + now.count, now.active, now.cache)
        masks = lambda: (state.in_prompt[:rows], now.in_output[:rows])
        allowed = logits
        if work in (None, WIDE):
            allowed = allow_only(logits, state.allowed[:rows], masked)
        token, finite = choose_tokens(allowed, sampling, length + now.count, masks, work)
        writes, bad = now.active & finite, now.active & ~finite
        stops = state.is_stop.at[slots, token].get(mode="promise_in_bounds")
        ends = stops | (length + now.count + 1 >= limit)
        in_output = now.in_output if work == GREEDY else now.in_output.at[slots, token].max(writes)
        return LoopState(
            cache=cache,
            in_output=in_output,
            step=now.step + 1,
            written=jnp.where(jnp.arange(MAX_STEPS)[:, None] == now.step, token, now.written),
            last=token,
            count=now.count + writes,
            active=writes & ~ends & ~masked & (now.step + 1 < steps),
            finished=now.finished | bad | (writes & ends),
            nonfinite=now.nonfinite | bad,
            scores=now.scores and now.scores.put(now.step, TokenScores.of(logits, token)),
        )

    if launches is not None:
        return jax.lax.fori_loop(0, launches, lambda _, now: step(now), now)
    return jax.lax.while_loop(lambda now: jnp.any(now.active), step, now)


def begin(state: DecodeState, rows: int, steps: jax.Array, *, scored: bool = False) -> LoopState:
    """What changes while tokens of the first ``rows`` slots are written, before the first."""
    return LoopState(
        cache=state.cache,
        in_output=state.in_output,
        step=jnp.int32(0),
        written=jnp.zeros((MAX_STEPS, rows), jnp.int32),
        last=last_tokens(state, rows)[:, 0],
        count=jnp.zeros((rows,), jnp.int32),
        active=state.ready[:rows] & (steps > 0),
        finished=jnp.zeros((rows,), bool),
        nonfinite=jnp.zeros((rows,), bool),
        scores=TokenScores.empty(MAX_STEPS, rows, top=_top(state)) if scored else None,
    )


def end(state: DecodeState, now: LoopState) -> tuple[DecodeState, StepResult]:
    """The state with what was written."""
    before, rows, order = state.length, len(now.last), jnp.arange(MAX_STEPS)
    real = order < now.count[:, None]
    where = jnp.where(real, before[:rows, None] + order, state.capacity)  # an index past the end is dropped
    state = replace(
        state,
        cache=now.cache,
        tokens=state.tokens.at[jnp.arange(rows)[:, None], where].set(now.written.T, mode="drop"),
        length=state.length.at[:rows].add(now.count),
        filled=state.filled.at[:rows].add(now.count + now.nonfinite),
        finished=state.finished.at[:rows].max(now.finished),
        nonfinite=state.nonfinite.at[:rows].max(now.nonfinite),
        in_output=now.in_output.at[jnp.arange(rows)[:, None], now.written.T].max(real),
        held=state.held.at[:rows].max((now.count > 0) & state.masked[:rows]),
    )
    return state, StepResult.of(state, before, MAX_STEPS, now.scores and now.scores.moved())


long_program = partial(Program, donate_argnames=("state",), compiler_options=COMPILER_OPTIONS, is_long=True)


@partial(long_program, static_argnames=("decoder", "rows", "scored"))
def decode(
    decoder: Decoder,
    params: Params,
    state: DecodeState,
    steps: jax.Array,
    *,
    rows: int,
    scored: bool = False,
) -> tuple[DecodeState, StepResult]:
    """Writes ``steps`` tokens, at most MAX_STEPS, for the sequences that are ready, less where they end.

    Args:
      steps: int32 scalar.
      rows: only the first ``rows`` slots take part; all that are ready must be among them.
      scored: the result has ``scores``; another program, so that the others stay what they are.
    """
    now = begin(state, rows, steps, scored=scored)
    write = partial(write_tokens, decoder, params, state, steps)
    if decoder.path(params, rows, state.cache).is_one_launch:
        # Loops without a branch or a condition, at which a GPU waits for the host at each token, for
        # all but the sampling that takes long itself. All call one compiled kernel.
        ways = [partial(write, work=work, launches=n) for work in (GREEDY, NARROW) for n in LAUNCHES]
        work = work_of(jax.tree.map(lambda x: x[:rows], state.sampling))
        size = jnp.sum(steps > jnp.asarray(LAUNCHES[:-1]))
        work = jnp.where(jnp.any(state.masked[:rows]), WIDE, work)
        way = jnp.where(work == WIDE, len(ways), work * len(LAUNCHES) + size)
        now = jax.lax.switch(way, [*ways, partial(write, work=WIDE)], now)
    else:
        now = write(now)
    return end(state, now)


def _top(state: DecodeState) -> int:
    """Rivals of each token that are known."""
    return min(MAX_TOP, state.is_stop.shape[1])


@partial(long_program, static_argnames=("decoder", "chunk", "rows", "scored"))
def prefill(
    decoder: Decoder,
    params: Params,
    state: DecodeState,
    slots: jax.Array,
    *,
    chunk: int,
    rows: int,
    scored: bool = False,
) -> tuple[DecodeState, StepResult]:
    """Reads a chunk of some prompts; a prompt's last token gives its first new one.

    Args:
      slots: int32 [P], different slots that are not ready. What their prompts lack of a whole
        chunk is padding: what it writes to the cache is overwritten before it is ever seen.
      chunk: one of PREFILL_CHUNKS.
      rows: the first ``rows`` slots also decode in the same forward pass, those that are ready;
        0 for none.
      scored: as for ``decode``.
    """
    before = state.length
    start, length = state.filled[slots], state.length[slots]
    columns = jnp.minimum(start[:, None] + jnp.arange(chunk), state.capacity - 1)
    token_ids, spans = state.tokens[slots[:, None], columns], [Span(start, chunk, slots, length)]
    ready = state.ready[:rows]
    if rows:
        # the decoded rows come first: where one is not ready, the chunk overwrites what it leaves
        filled = state.filled[:rows]
        spans.insert(0, Span(filled, 1, ends=filled + ready))
        token_ids = jnp.concatenate([last_tokens(state, rows)[:, 0], token_ids.reshape(-1)])[None]
    network = decoder.model.bind(params)
    output = network(token_ids, state.cache, spans)

    ends_here = length <= start + chunk
    filled = state.filled.at[slots].set(jnp.minimum(start + chunk, length)).at[:rows].add(ready)
    state = replace(state, cache=output.cache, filled=filled)
    hidden = output.hidden.reshape(-1, output.hidden.shape[-1])
    of_prompts = hidden[rows:].reshape(len(slots), chunk, -1)
    last = jnp.clip(length - 1 - start, 0, chunk - 1)
    hidden = jnp.concatenate([hidden[:rows], of_prompts[jnp.arange(len(slots)), last]])
    writes = jnp.concatenate([ready, ends_here])

    def write(state: DecodeState, scores: TokenScores | None) -> tuple[DecodeState, TokenScores | None]:
        logits = network.logits(hidden)
        return append_tokens(state, jnp.concatenate([jnp.arange(rows), slots]), logits, writes, scores)

    scores = TokenScores.empty(len(before), 1, top=_top(state)) if scored else None
    state, scores = jax.lax.cond(jnp.any(writes), write, lambda *same: same, state, scores)
    return state, StepResult.of(state, before, 1, scores)
