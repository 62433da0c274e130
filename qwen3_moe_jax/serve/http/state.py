"""What every endpoint works with."""

import asyncio
import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from starlette.requests import Request

from qwen3_moe_jax.serve.engine.replicas import Engine
from qwen3_moe_jax.serve.generation import Answer, Wish, choices
from qwen3_moe_jax.serve.grammar import Grammars
from qwen3_moe_jax.serve.http import json_body
from qwen3_moe_jax.serve.http.errors import ApiError, full
from qwen3_moe_jax.serve.http.metrics import Metrics
from qwen3_moe_jax.serve.http.schemas import Body, Common
from qwen3_moe_jax.serve.settings import Settings
from qwen3_moe_jax.serve.text_model import TextModel

B = TypeVar("B", bound=Body)


@dataclass
class Service:
    """The loaded model as endpoints see it.

    Attributes:
      preparing: sequences that are being tokenised: they have a place in the queue already.
    """

    settings: Settings
    engine: Engine
    model: TextModel
    grammars: Grammars
    metrics: Metrics
    preparing: int = 0

    @property
    def name(self) -> str:
        return self.model.name

    @property
    def context(self) -> int:
        return self.engine.ready.context if self.engine.ready else self.model.context

    def parse(self, request: Request, kind: type[B]) -> B:
        """The checked body of a request.

        Raises:
          ApiError, pydantic.ValidationError: it is not what it should be, or wants an answer and there is no
            room: who is refused costs those who are served little. Scores alone (``echo``) need none.
        """
        is_loaded = self.engine.ready is not None
        if is_loaded and issubclass(kind, Common) and b'"echo"' not in request.state.body:
            self._check_room(1)
        body = kind.model_validate(json_body.parse(request.state.body, self.settings))
        if body.unknown:
            self.metrics.unknown_fields.inc(len(body.unknown))
            if self.settings.strict_fields:
                raise ApiError(400, f"unknown fields: {', '.join(body.unknown)}"[:300], param=body.unknown[0])
        asked = getattr(body, "model", None)
        if self.settings.strict_model and asked not in (None, self.name):
            raise ApiError(404, "there is no such model here", code="model_not_found", param="model")
        return body

    @contextlib.contextmanager
    def place(self, count: int = 1) -> Iterator["Place"]:
        """Room in the queue for ``count`` sequences while a request is prepared: checked before any work.

        Raises:
          ApiError: 429, there is none.
          EngineError: the engine takes nothing now.
        """
        self.engine.check()
        self._check_room(count)
        place = Place(self, count)
        try:
            yield place
        finally:
            place.give_back()

    def _check_room(self, count: int) -> None:
        room = self.engine.loaded().slots + self.settings.max_queue
        if self.engine.active + self.preparing + count > room:
            raise full()

    async def close(self) -> None:
        """Ends the processes that belong to it."""
        self.grammars.close()
        await self.engine.close()

    def finished(self, answer: Answer) -> None:
        """Counts an answer that has ended."""
        self.metrics.answered(answer.usage, answer.finish_reason or "abort")


class Place:
    """Room that a request has in the queue, until its sequences are in the engine's own count."""

    def __init__(self, service: Service, count: int):
        self._service, self._count = service, count
        service.preparing += count

    def submit(self, wishes: Sequence[Wish], n: int = 1) -> list[Answer]:
        """Answers to these, ``n`` of each, all in the queue.

        Raises:
          ApiError: 429, more prompt tokens wait than may; 501, the backend has no masks.
          EngineError: the engine takes nothing now.
        """
        service, engine = self._service, self._service.engine
        tokens = engine.active_tokens + sum(len(w.token_ids) for w in wishes) * n
        if engine.waiting and tokens > service.settings.max_queue_tokens:
            raise full()
        if any(w.constraint is not None for w in wishes) and not engine.loaded().has_masks:
            raise ApiError(501, "this backend cannot constrain answers: use the jax backend")
        self.give_back()  # now: other requests are looked at before this one's handler goes on
        return [a for w in wishes for a in choices(engine, service.model, w, n)]

    def give_back(self) -> None:
        """Ends it; again is no fault."""
        self._service.preparing -= self._count
        self._count = 0


async def in_thread(work: Any, *arguments: Any, **options: Any) -> Any:
    """Runs what takes long (templates, tokenizers) beside the event loop."""
    return await asyncio.to_thread(work, *arguments, **options)
