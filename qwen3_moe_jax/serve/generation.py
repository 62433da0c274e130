"""One answer: tokens from the engine become reasoning, text and tool calls, whatever protocol asks."""

import asyncio
import itertools
from collections.abc import AsyncIterator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from qwen3_moe_jax.core.batch import TokenScore
from qwen3_moe_jax.core.sampling import Sampling
from qwen3_moe_jax.serve.engine.client import EngineDiedError, EngineError, Part, Stream
from qwen3_moe_jax.serve.engine.replicas import Engine
from qwen3_moe_jax.serve.grammar import Constraint
from qwen3_moe_jax.serve.text_model import TextModel
from qwen3_moe_jax.serve.tools import CallArguments, CallStart, Text, ToolParser
from qwen3_moe_jax.text.stream import ReasoningSplitter, StopStrings
from qwen3_moe_jax.text.tokenizer import StreamDecoder

END_OF_THINKING = "\n</think>\n\n"
"""What is written for a model whose thinking has used its budget up."""


@dataclass(frozen=True)
class Reasoning:
    """A piece of thinking."""

    text: str


Delta = Reasoning | Text | CallStart | CallArguments


def text_of(delta: Delta) -> str:
    """The text of a delta; a call's start has none."""
    return "" if isinstance(delta, CallStart) else delta.text


def joined(deltas: Iterable[Delta]) -> Iterator[Delta]:
    """The same deltas with neighbours that are both text, or both thinking, in one."""
    for kind, group in itertools.groupby(deltas, type):
        if kind is Text or kind is Reasoning:
            yield kind("".join([text_of(delta) for delta in group]))
        else:
            yield from group


@dataclass(frozen=True)
class Wish:
    """What an answer should be.

    Attributes:
      token_ids: the prompt.
      max_tokens: new tokens at most; None fills the context.
      key, scope: of the queue and of the prefix cache (``scheduler.Job``).
      splits: whether thinking and calls are told from text; plain completions want all as text.
      schemas: of tools that may be called (``tools.tool_schemas``); None if there are none.
      thinking_budget: tokens of thinking at most; None is no bound.
      constraint: what the answer must match; each answer needs one of its own.
      think_id: the token that may open a thought before what is constrained; None if none may.
      one_call: the answer ends after its first call.
      queue_seconds: how long it may wait for a slot.
      top: scores of the tokens are wanted, with so many rivals each; None wants none.
    """

    token_ids: list[int]
    sampling: Sampling
    max_tokens: int | None = None
    stop: tuple[str, ...] = ()
    key: str = ""
    scope: str | None = None
    splits: bool = True
    starts_in_reasoning: bool = False
    schemas: Mapping[str, Mapping[str, Any]] | None = None
    thinking_budget: int | None = None
    constraint: Constraint | None = None
    think_id: int | None = None
    one_call: bool = False
    stop_ids: frozenset[int] = frozenset()
    queue_seconds: float = 300.0
    top: int | None = None


@dataclass
class Usage:
    """Token counts of one answer; ``cached``, of the prompt's, were not read again."""

    prompt: int = 0
    cached: int = 0
    completion: int = 0
    reasoning: int = 0


@dataclass
class Answer:
    """An answer while it is written. ``submit``, then iterate once, or take ``whole``.

    Attributes:
      finish_reason: "stop", "length" or "tool_calls"; None before the end.
      stop_string: the stop string that ended it, or None.
      token_ids: what was written.
      scores: of these, where the engine gives them while it writes; else empty.
      usage: counts so far.
    """

    engine: Engine
    model: TextModel
    wish: Wish
    finish_reason: str | None = None
    token_ids: list[int] = field(default_factory=list)
    scores: list[TokenScore] = field(default_factory=list)
    usage: Usage = field(default_factory=Usage)
    _stream: Stream | None = None
    _is_patient: bool = False  # nobody sees a part before the end, and no part can end it

    def __post_init__(self):
        self._begin()

    def _begin(self) -> None:
        """Nothing is written yet."""
        w = self.wish
        self.finish_reason = None
        self.token_ids, self.scores, self.usage = [], [], Usage()
        self._decoder = StreamDecoder(self.model.tokenizer)
        self._stops = StopStrings(w.stop)
        self._splitter = ReasoningSplitter(starts_in_reasoning=w.starts_in_reasoning) if w.splits else None
        self._tools = ToolParser(w.schemas) if w.schemas else None
        self._budget = w.thinking_budget
        self._has_call = False
        self._unmatched: list[int] = []  # tokens that the grammar has not been told of
        self.usage.prompt = len(w.token_ids)
        room = self._capacity - len(w.token_ids)
        self._limit = min(w.max_tokens or room, room)

    @property
    def _is_scored(self) -> bool:
        return self.wish.top is not None and self.engine.ready is not None and self.engine.ready.has_scores

    @property
    def stop_string(self) -> str | None:
        return self._stops.found

    @property
    def _capacity(self) -> int:
        return self.engine.ready.context if self.engine.ready else self.model.context

    def submit(self) -> None:
        """Puts it into the engine's queue.

        Raises:
          EngineError: the engine takes nothing now.
        """
        self._stream = self._leg(self.wish.token_ids)

    def _leg(self, prompt: list[int], *, is_resumed: bool = False) -> Stream:
        """Asks for tokens after ``prompt``, up to the thinking budget if that is still ahead."""
        w, limit = self.wish, self._limit - len(self.token_ids)
        if self._budget is not None:
            limit = min(limit, max(1, self._budget - len(self.token_ids)))
        mask = self._next_mask(w.constraint) if w.constraint else None
        stream = self.engine.submit(
            prompt,
            key=w.key,
            sampling=w.sampling,
            max_tokens=limit,
            stop_ids=sorted(w.stop_ids),
            scope=w.scope,
            is_resumed=is_resumed,
            first_mask=mask,
            top=w.top if self._is_scored else None,
        )
        stream.is_patient = self._is_patient
        return stream

    async def whole(self) -> list[Delta]:
        """All of it, once it has ended.

        Nobody has seen a part of it before, so it begins again where its engine died and there are others.

        Raises:
          EngineError: it cannot be written.
        """
        self._is_patient = self.wish.constraint is None and not self.wish.stop and not self.wish.one_call
        self._submitted.is_patient = self._is_patient
        for _ in range(self.engine.reruns):
            try:
                return [delta async for delta in self]
            except EngineDiedError:
                self._begin_again()
        return [delta async for delta in self]

    def _begin_again(self) -> None:
        constraint = self.wish.constraint
        if constraint is not None:
            self.wish = replace(self.wish, constraint=constraint.copy())
        self._begin()
        self._stream = self._leg(self.wish.token_ids, is_resumed=True)

    async def __aiter__(self) -> AsyncIterator[Delta]:
        try:
            await self._began()
            while True:
                reason = None
                async for part in self._submitted:
                    reason = part.finish_reason
                    if not self.token_ids:  # where it began, if it began twice
                        self.usage.cached = self._submitted.cached or 0
                    for delta in self._push(part):
                        yield delta
                    if self.finish_reason:
                        return
                    if self.wish.constraint is not None:
                        await self._constrain(self.wish.constraint, reason)
                if not self._goes_on(reason):
                    break
                for delta in self._resume():
                    yield delta
            for delta in self._finish(reason):
                yield delta
        finally:
            self.close()

    @property
    def _submitted(self) -> Stream:
        if self._stream is None:
            raise RuntimeError("an answer is submitted before it is read")
        return self._stream

    def close(self) -> None:
        """Gives the engine's slot back; an answer that has ended has none."""
        if self._stream is not None:
            self.engine.cancel(self._stream)

    async def _began(self) -> None:
        try:
            async with asyncio.timeout(self.wish.queue_seconds):
                await self._submitted.began.wait()
        except TimeoutError:
            raise EngineError("unavailable", "no slot got free in time; try again later") from None
        self.usage.cached = self._submitted.cached or 0

    # -- tokens to deltas

    def _push(self, part: Part) -> Iterator[Delta]:
        """The deltas of new tokens; what comes at once and is of one kind is one delta, and so one event."""
        return joined(self._deltas(part))

    def _deltas(self, part: Part) -> Iterator[Delta]:
        texts = [self._decoder.push(token) for token in part.tokens]
        start = 0
        while start < len(texts):
            count = self._uneventful(texts, start)
            text, these = "".join(texts[start : start + count]), slice(start, start + count)
            tokens = part.tokens[these]
            self.token_ids += tokens
            if part.scores is not None:
                self.scores += part.scores[these]
            start += count
            self.usage.completion += count
            did_think = self._thinks
            deltas = list(self._emit(self._stops.push(text)))
            if did_think or self._thinks:
                self.usage.reasoning = len(self.token_ids)
            else:
                self._unmatched += tokens
                if self._splitter is None or self._splitter.has_begun:
                    self._budget = None
            yield from deltas
            if self._stops.found is not None:
                yield from self._finish("stop")
                return
            if self.finish_reason:
                return

    def _uneventful(self, texts: Sequence[str], start: int) -> int:
        """How many of the next tokens may be taken together: one, or as many as are known to do nothing that
        is told of a single token, which is to end the answer, or to begin or end its thinking."""
        count = 1 if self.wish.one_call else len(texts) - start
        while count > 1:
            text = self._stops.without_end("".join(texts[start : start + count]))
            if text is not None and (self._splitter is None or self._splitter.stays_in(text)):
                break
            count //= 2
        return count

    async def _constrain(self, constraint: Constraint, reason: str | None) -> None:
        """After tokens of a constrained answer: the grammar goes on, and the engine may."""
        if self._unmatched and reason != "stop":
            await constraint.take(self._unmatched)
        self._unmatched = []
        if reason is None:
            self.engine.allow(self._submitted, self._next_mask(constraint))

    @property
    def _thinks(self) -> bool:
        return self._splitter is not None and self._splitter.is_reasoning

    def _next_mask(self, constraint: Constraint) -> bytes:
        """Tokens that may come next: thinking is free, and may be opened where the wish allows it."""
        if self._thinks:
            return constraint.everything()
        may_open = self._splitter is not None and not self._splitter.has_begun and not self.token_ids
        return constraint.mask(self.wish.think_id if may_open else None)

    def _emit(self, text: str, *, is_last: bool = False) -> Iterator[Delta]:
        if self._splitter is None:
            if text:
                yield Text(text)
            return
        pieces = self._splitter.push(text)
        if is_last:
            pieces += self._splitter.finish()
        for piece in pieces:
            if piece.kind == "reasoning":
                yield Reasoning(piece.text)
            else:
                yield from self._content(piece.text)
        if is_last and self._tools is not None:
            yield from self._checked(self._tools.finish())

    def _content(self, text: str) -> Iterator[Delta]:
        if self._tools is None:
            yield Text(text)
        else:
            yield from self._checked(self._tools.push(text))

    def _checked(self, deltas: Sequence[Delta]) -> Iterator[Delta]:
        """With ``one_call``, nothing after the first call."""
        for delta in deltas:
            if self.finish_reason:
                return
            is_start = isinstance(delta, CallStart)
            if self.wish.one_call and self._has_call and (is_start or isinstance(delta, Text)):
                self.finish_reason = "tool_calls"
                return
            self._has_call |= is_start
            yield delta

    # -- legs: an answer whose thinking has a budget is asked for in parts

    def _goes_on(self, reason: str | None) -> bool:
        return reason == "length" and len(self.token_ids) < self._limit

    def _resume(self) -> Iterator[Delta]:
        """The next leg; a thought that is not over is ended in its name."""
        if self._thinks:
            forced = self.model.tokenizer.encode(END_OF_THINKING)
            forced = forced[: self._limit - len(self.token_ids) - 1]
            for token in forced:
                self.token_ids.append(token)
                if self._is_scored:
                    self.scores.append(TokenScore(0.0, []))  # it was certain to come
                self.usage.completion += 1
                yield from self._emit(self._stops.push(self._decoder.push(token)))
        if self._splitter is None or self._splitter.has_begun:
            self._budget = None
        self._stream = self._leg(self.wish.token_ids + self.token_ids, is_resumed=True)

    def _finish(self, reason: str | None) -> Iterator[Delta]:
        if reason == "nonfinite":
            raise EngineError("engine", "the model's logits were not finite: no token can be chosen")
        text = self._stops.push(self._decoder.finish()) if self._stops.found is None else ""
        if self._stops.found is None:
            text += self._stops.finish()
        yield from self._emit(text, is_last=True)
        if self.finish_reason is None:
            self.finish_reason = "tool_calls" if self._has_call and reason == "stop" else reason or "stop"


def choices(engine: Engine, model: TextModel, wish: Wish, n: int) -> list[Answer]:
    """``n`` answers to one wish, each with a seed of its own, all in the queue.

    Raises:
      EngineError: the engine takes nothing now.
    """
    seeds = [replace(wish.sampling, seed=(wish.sampling.seed + i) % 2**32) for i in range(n)]
    copies = [None if wish.constraint is None else wish.constraint.copy() for _ in seeds]
    answers = [
        Answer(engine, model, replace(wish, sampling=s, constraint=c))
        for s, c in zip(seeds, copies, strict=True)
    ]
    for answer in answers:
        answer.submit()
    return answers
