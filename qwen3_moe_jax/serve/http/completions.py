"""POST /v1/completions and POST /infill: text without a chat."""

import asyncio
import time
from collections.abc import AsyncGenerator
from dataclasses import dataclass
from typing import Any
from uuid import uuid4

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from qwen3_moe_jax.serve.generation import Answer, Usage, text_of
from qwen3_moe_jax.serve.http import logprobs, wishes
from qwen3_moe_jax.serve.http.errors import ApiError, as_api_error
from qwen3_moe_jax.serve.http.merge import merged
from qwen3_moe_jax.serve.http.schemas import CompletionRequest, InfillRequest
from qwen3_moe_jax.serve.http.state import Place, Service, in_thread
from qwen3_moe_jax.serve.http.streams import DONE, EventStream, data, until_gone
from qwen3_moe_jax.serve.text_model import Prompt

MAX_PROMPTS = 512
"""Prompts of one request."""


async def completions(request: Request) -> Response:
    """OpenAI's completions, with ``echo``, log-probabilities, lists of prompts and of token ids."""
    service: Service = request.app.state.service
    r = service.parse(request, CompletionRequest)
    _refuse(r)
    count = (r.n or 1) * _count(r.prompt)
    with service.place(count if r.max_tokens != 0 else 0) as place:
        reply = await until_gone(request.receive, _prepare(service, place, r, request.state.key))
    if r.stream:
        return EventStream(reply.events(), service.settings)
    return JSONResponse(await until_gone(request.receive, reply.whole()))


def _refuse(r: CompletionRequest) -> None:
    wishes.refuse_what_is_missing(r)
    if r.best_of not in (None, r.n or 1):
        raise ApiError(400, "best_of other than n is not served", param="best_of")
    if r.max_tokens == 0 and not r.echo:
        raise ApiError(400, "max_tokens 0 needs echo", param="max_tokens")
    if r.echo and r.suffix:
        raise ApiError(400, "echo and suffix do not go together", param="suffix")
    if _count(r.prompt) > MAX_PROMPTS:
        raise ApiError(400, f"at most {MAX_PROMPTS} prompts", param="prompt")


def _count(prompt: Any) -> int:
    return len(prompt) if isinstance(prompt, list) and prompt and not isinstance(prompt[0], int) else 1


async def _prepare(service: Service, place: Place, r: CompletionRequest, key: str) -> "Reply":
    given = r.prompt if _count(r.prompt) > 1 or (r.prompt and isinstance(r.prompt[0], list)) else [r.prompt]
    if isinstance(r.prompt, list) and r.prompt and isinstance(r.prompt[0], str):
        given = r.prompt
    prompts = [await _prompt(service, p, r.suffix) for p in given]
    stop = wishes.stops(r.stop, service.settings)
    make = lambda p: wishes.wish(
        r,
        p,
        service.model,
        service.settings,
        key,
        context=service.context,
        stop=stop,
        max_tokens=r.max_tokens or None,
        splits=False,
        top=r.logprobs,
    )
    found = [make(p) for p in prompts]
    answers = place.submit(found, r.n or 1) if r.max_tokens != 0 else []
    return Reply(service, r, prompts, answers)


async def _prompt(service: Service, given: Any, suffix: str | None) -> Prompt:
    if isinstance(given, list):  # tokens already: a thread would cost more than all else
        if suffix:
            raise ApiError(400, "suffix needs a text as prompt", param="suffix")
        return Prompt(given)
    try:
        if suffix:
            return await in_thread(service.model.fill_in_middle, given, suffix)
        return await in_thread(service.model.raw, given)
    except ValueError as error:
        raise ApiError(400, str(error), param="prompt") from None


@dataclass
class Reply:
    """Answers in the form of completions; answer number i is to prompt number i // n."""

    service: Service
    r: CompletionRequest
    prompts: list[Prompt]
    answers: list[Answer]

    def __post_init__(self):
        self._head = {
            "id": f"cmpl-{uuid4().hex}",
            "object": "text_completion",
            "created": int(time.time()),
            "model": self.service.name,
        }
        self._n = self.r.n or 1

    @property
    def usage(self) -> dict[str, Any]:
        prompt = sum(len(p.token_ids) for p in self.prompts)
        written = [a.usage for a in self.answers] or [Usage()]
        completion = sum(u.completion for u in written)
        cached = sum(u.cached for u in written[:: self._n])
        return {
            "prompt_tokens": prompt,
            "completion_tokens": completion,
            "total_tokens": prompt + completion,
            "prompt_tokens_details": {"cached_tokens": cached},
        }

    async def whole(self) -> dict[str, Any]:
        """The reply that does not stream."""
        try:
            if not self.answers:  # the prompts alone
                work = [self._choice(i, None) for i in range(len(self.prompts) * self._n)]
            else:
                work = [self._choice(i, a) for i, a in enumerate(self.answers)]
            found = await asyncio.gather(*work)
        finally:
            self._close()
        return {**self._head, "choices": list(found), "usage": self.usage}

    def _close(self) -> None:
        for answer in self.answers:
            answer.close()

    def _echo(self, index: int) -> str:
        prompt = self.prompts[index // self._n]
        if not self.r.echo:
            return ""
        return prompt.text or self.service.model.tokenizer.decode(prompt.token_ids, show_control=True)

    async def _choice(self, index: int, answer: Answer | None) -> dict[str, Any]:
        text, reason = self._echo(index), "length"
        if answer is not None:
            text += "".join([text_of(delta) for delta in await answer.whole()])
            reason = answer.finish_reason
            self.service.finished(answer)
        scored = await self._logprobs(index, answer)
        return {"index": index, "text": text, "logprobs": scored, "finish_reason": reason}

    async def _logprobs(self, index: int, answer: Answer | None) -> dict[str, Any] | None:
        """Of a whole choice."""
        if self.r.logprobs is None:
            return None
        tokens, scores = await self._of_echo(index)
        if answer is not None:
            await logprobs.complete(self.service, answer)
            tokens, scores = [*tokens, *answer.token_ids], [*scores, *answer.scores]
        return self._offsets(index).piece(tokens, scores)

    def _offsets(self, index: int) -> logprobs.Offsets:
        return logprobs.Offsets(self.service, self.r.logprobs or 0)

    async def _of_echo(self, index: int) -> tuple[list[int], list[Any]]:
        """The prompt's tokens and their scores, where it is echoed."""
        if not self.r.echo or self.r.logprobs is None:
            return [], []
        prompt = self.prompts[index // self._n].token_ids
        return prompt, await logprobs.of_prompt(self.service, prompt, max(self.r.logprobs, 1))

    async def events(self) -> AsyncGenerator[bytes]:
        """The reply as it is written."""
        count, wants = len(self.prompts) * self._n, self.r.logprobs is not None
        offsets = [self._offsets(i) for i in range(count)]
        reported = [logprobs.Reported(self.service, a) for a in self.answers]
        new = lambda i: offsets[i].piece(*reported[i].new()) if wants else None
        try:
            if self.r.echo:
                for i in range(count):
                    echoed = offsets[i].piece(*await self._of_echo(i)) if wants else None
                    reason = None if self.answers else "length"
                    yield self._chunk(i, self._echo(i), reason, echoed)
            async for i, delta in merged(self.answers):
                if delta is not None:
                    yield self._chunk(i, text_of(delta), scored=new(i))
                    continue
                answer = self.answers[i]
                self.service.finished(answer)
                await logprobs.complete(self.service, answer)
                yield self._chunk(i, "", answer.finish_reason, new(i))
            if self.r.stream_options and self.r.stream_options.include_usage:
                yield data({**self._head, "choices": [], "usage": self.usage})
            yield DONE
        except Exception as error:
            found = as_api_error(error)
            yield data((found or ApiError(500, "the server failed")).body())
            if found is None:
                raise
        finally:
            self._close()

    def _chunk(self, index: int, text: str, reason: str | None = None, scored: Any = None) -> bytes:
        choice = {"index": index, "text": text, "logprobs": scored, "finish_reason": reason}
        return data({**self._head, "choices": [choice]})


async def infill(request: Request) -> Response:
    """llama-server's way to fill in the middle."""
    service: Service = request.app.state.service
    r = service.parse(request, InfillRequest)
    wishes.refuse_what_is_missing(r)
    with service.place() as place:
        answer = await until_gone(request.receive, _prepare_infill(service, place, r, request.state.key))
    if r.stream:
        return EventStream(_infill_events(service, answer), service.settings)
    return JSONResponse(await until_gone(request.receive, _infill_whole(service, answer)))


async def _prepare_infill(service: Service, place: Place, r: InfillRequest, key: str) -> Answer:
    try:
        fill = service.model.fill_in_middle
        prompt = await in_thread(fill, r.input_prefix + r.prompt, r.input_suffix)
    except ValueError as error:
        raise ApiError(400, str(error)) from None
    limit = r.max_tokens or (r.n_predict if (r.n_predict or 0) > 0 else None)
    wish = wishes.wish(
        r,
        prompt,
        service.model,
        service.settings,
        key,
        context=service.context,
        stop=wishes.stops(r.stop, service.settings),
        max_tokens=limit,
        splits=False,
    )
    return place.submit([wish])[0]


def _infill_end(answer: Answer) -> dict[str, Any]:
    u = answer.usage
    kind = "word" if answer.stop_string else "limit" if answer.finish_reason == "length" else "eos"
    counts = {"tokens_predicted": u.completion, "tokens_evaluated": u.prompt, "tokens_cached": u.cached}
    return {"stop": True, "stop_type": kind, "stopping_word": answer.stop_string or "", **counts}


async def _infill_whole(service: Service, answer: Answer) -> dict[str, Any]:
    try:
        text = "".join([text_of(delta) for delta in await answer.whole()])
    finally:
        answer.close()
    service.finished(answer)
    return {"content": text, "model": service.name, **_infill_end(answer)}


async def _infill_events(service: Service, answer: Answer) -> AsyncGenerator[bytes]:
    try:
        async for delta in answer:
            yield data({"content": text_of(delta), "stop": False})
        service.finished(answer)
        yield data({"content": "", "model": service.name, **_infill_end(answer)})
    except Exception as error:
        yield data((as_api_error(error) or ApiError(500, "the server failed")).body())
    finally:
        answer.close()
