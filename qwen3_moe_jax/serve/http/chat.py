"""POST /v1/chat/completions."""

import asyncio
import time
from collections.abc import AsyncGenerator, Sequence
from typing import Any
from uuid import uuid4

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from qwen3_moe_jax.serve import messages
from qwen3_moe_jax.serve.generation import Answer, Delta, Reasoning, Usage
from qwen3_moe_jax.serve.http import logprobs, wishes
from qwen3_moe_jax.serve.http.errors import ApiError, as_api_error
from qwen3_moe_jax.serve.http.merge import merged
from qwen3_moe_jax.serve.http.schemas import ChatRequest
from qwen3_moe_jax.serve.http.state import Place, Service, in_thread
from qwen3_moe_jax.serve.http.streams import DONE, EventStream, data, until_gone
from qwen3_moe_jax.serve.tools import CallArguments, CallStart, Text, tool_schemas


async def chat_completions(request: Request) -> Response:
    """OpenAI's chat."""
    service: Service = request.app.state.service
    r = service.parse(request, ChatRequest)
    n = r.n or 1
    with service.place(n) as place:
        answers, skipped = await until_gone(request.receive, _prepare(service, place, r, request.state.key))
    headers = wishes.skipped_header(skipped)
    reply = Reply(service, r, answers)
    if r.stream:
        return EventStream(reply.events(), service.settings, headers)
    return JSONResponse(await until_gone(request.receive, reply.whole()), headers=headers)


def _refuse(r: ChatRequest) -> None:
    wishes.refuse_what_is_missing(r)
    if r.audio is not None or any(m != "text" for m in r.modalities or ()):
        raise ApiError(400, "the model writes text only", param="modalities")
    if r.functions or r.function_call:
        raise ApiError(400, "functions is an old name: use tools", param="functions")
    if r.top_logprobs and not r.logprobs:
        raise ApiError(400, "top_logprobs needs logprobs", param="top_logprobs")


async def _prepare(
    service: Service, place: Place, r: ChatRequest, key: str
) -> tuple[list[Answer], list[str]]:
    _refuse(r)
    tools, skipped = messages.function_tools(r.tools)
    names = [t["function"]["name"] for t in tools]
    chosen = wishes.choice(r.tool_choice, has_tools=bool(tools), names=names)
    if chosen.kind == "none":
        tools = []
    think = wishes.thinking(r, r.reasoning_effort)
    stop = wishes.stops(r.stop, service.settings)
    chat = messages.from_chat(r.messages)
    prompt = await in_thread(service.model.chat, chat, tools, thinking=think.is_on)
    parallel = r.parallel_tool_calls is not False
    constraint = await wishes.constraint(
        service.grammars, tools, chosen, r.response_format, parallel=parallel
    )
    wish = wishes.wish(
        r,
        prompt,
        service.model,
        service.settings,
        key,
        think=think,
        context=service.context,
        stop=stop,
        max_tokens=r.max_completion_tokens or r.max_tokens,
        schemas=tool_schemas(tools) or None,
        constraint=constraint,
        think_id=None if constraint is None else think_id(service, think),
        one_call=not parallel or chosen.name is not None,
        top=(r.top_logprobs or 0) if r.logprobs else None,
    )
    return place.submit([wish], r.n or 1), skipped


def think_id(service: Service, think: wishes.Thinking) -> int | None:
    """The token that opens a thought before a constrained answer, if the model may think."""
    if think.is_on is not True or not service.model.has_thinking_switch:
        return None
    ids = service.model.tokenizer.encode("<think>")
    return ids[0] if len(ids) == 1 else None


def usage_of(usages: Sequence[Usage]) -> dict[str, Any]:
    """OpenAI's usage of several answers to one prompt."""
    prompt, completion = usages[0].prompt, sum(u.completion for u in usages)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        "prompt_tokens_details": {"cached_tokens": usages[0].cached},
        "completion_tokens_details": {"reasoning_tokens": sum(u.reasoning for u in usages)},
    }


def call_id() -> str:
    """A new name of a tool call."""
    return f"call_{uuid4().hex[:24]}"


class Reply:
    """Answers in the form of chat completions."""

    def __init__(self, service: Service, r: ChatRequest, answers: list[Answer]):
        self._service, self._r, self._answers = service, r, answers
        self._began = time.perf_counter()
        self._head = {
            "id": f"chatcmpl-{uuid4().hex}",
            "object": "chat.completion.chunk" if r.stream else "chat.completion",
            "created": int(time.time()),
            "model": service.name,
            "system_fingerprint": None,
        }

    async def whole(self) -> dict[str, Any]:
        """The reply that does not stream."""
        try:
            found = await asyncio.gather(*(self._choice(i, a) for i, a in enumerate(self._answers)))
        finally:
            for answer in self._answers:
                answer.close()
        return {**self._head, "choices": list(found), "usage": usage_of([a.usage for a in self._answers])}

    async def _choice(self, index: int, answer: Answer) -> dict[str, Any]:
        message: dict[str, Any] = {"role": "assistant", "content": None, "refusal": None}
        text, reasoning, calls = [], [], []
        for delta in await answer.whole():
            if isinstance(delta, Text):
                text.append(delta.text)
            elif isinstance(delta, Reasoning):
                reasoning.append(delta.text)
            elif isinstance(delta, CallStart):
                function = {"name": delta.name, "arguments": ""}
                calls.append({"id": call_id(), "type": "function", "function": function})
            else:
                calls[delta.index]["function"]["arguments"] += delta.text
        self._service.finished(answer)
        message["content"] = "".join(text) if text or not calls else None
        if reasoning:
            message["reasoning_content"] = message["reasoning"] = "".join(reasoning)
        if calls:
            message["tool_calls"] = calls
        await logprobs.complete(self._service, answer)
        scored = self._scored(logprobs.Reported(self._service, answer))
        return {"index": index, "message": message, "logprobs": scored, "finish_reason": answer.finish_reason}

    def _scored(self, reported: logprobs.Reported) -> dict[str, Any] | None:
        """What an answer has of scores that were not sent."""
        return {"content": reported.entries(), "refusal": None} if self._r.logprobs else None

    async def events(self) -> AsyncGenerator[bytes]:
        """The reply as it is written; several choices take turns."""
        reported = [logprobs.Reported(self._service, a) for a in self._answers]
        try:
            for i in range(len(self._answers)):
                yield self._chunk(i, {"role": "assistant", "content": ""})
            async for i, delta in merged(self._answers):
                if self._began is not None:
                    self._service.metrics.first_token.observe(time.perf_counter() - self._began)
                    self._began = None
                if delta is not None:
                    yield self._chunk(i, self._delta(delta), scored=self._scored(reported[i]))
                    continue
                answer = self._answers[i]
                self._service.finished(answer)
                await logprobs.complete(self._service, answer)
                yield self._chunk(i, {"content": None}, answer.finish_reason, self._scored(reported[i]))
            if self._r.stream_options and self._r.stream_options.include_usage:
                usage = usage_of([a.usage for a in self._answers])
                yield data({**self._head, "choices": [], "usage": usage})
            yield DONE
        except Exception as error:
            found = as_api_error(error)
            yield data((found or ApiError(500, "the server failed")).body())
            if found is None:
                raise
        finally:
            for answer in self._answers:
                answer.close()

    def _chunk(self, index: int, delta: dict, reason: str | None = None, scored: Any = None) -> bytes:
        choice = {"index": index, "delta": delta, "logprobs": scored, "finish_reason": reason}
        return data({**self._head, "choices": [choice]})

    def _delta(self, delta: Delta) -> dict[str, Any]:
        if isinstance(delta, Text):
            return {"content": delta.text}
        if isinstance(delta, Reasoning):
            return {"content": None, "reasoning_content": delta.text, "reasoning": delta.text}
        call: dict[str, Any] = {"index": delta.index}
        if isinstance(delta, CallStart):
            function = {"name": delta.name, "arguments": ""}
            call |= {"id": call_id(), "type": "function", "function": function}
        elif isinstance(delta, CallArguments):
            call["function"] = {"arguments": delta.text}
        return {"content": None, "tool_calls": [call]}
