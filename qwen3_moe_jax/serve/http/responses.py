"""POST /v1/responses: OpenAI's newer protocol, stateless: nothing is kept between requests."""

import time
from collections.abc import AsyncGenerator, Mapping
from typing import Any
from uuid import uuid4

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from qwen3_moe_jax.serve import messages as chats
from qwen3_moe_jax.serve.generation import Answer, Delta, Reasoning
from qwen3_moe_jax.serve.http import logprobs, wishes
from qwen3_moe_jax.serve.http.chat import call_id, think_id
from qwen3_moe_jax.serve.http.errors import ApiError, as_api_error
from qwen3_moe_jax.serve.http.schemas import ResponsesRequest
from qwen3_moe_jax.serve.http.state import Place, Service, in_thread
from qwen3_moe_jax.serve.http.streams import EventStream, event, until_gone
from qwen3_moe_jax.serve.tools import CallStart, Text, tool_schemas
from qwen3_moe_jax.text.chat_template import MessageError


async def responses(request: Request) -> Response:
    """OpenAI's responses."""
    service: Service = request.app.state.service
    r = service.parse(request, ResponsesRequest)
    with service.place() as place:
        answer, skipped = await until_gone(request.receive, _prepare(service, place, r, request.state.key))
    headers = wishes.skipped_header(skipped)
    reply = Reply(service, r, answer)
    if r.stream:
        return EventStream(reply.events(), service.settings, headers)
    return JSONResponse(await until_gone(request.receive, reply.whole()), headers=headers)


async def _prepare(service: Service, place: Place, r: ResponsesRequest, key: str) -> tuple[Answer, list[str]]:
    wishes.refuse_what_is_missing(r)
    if r.previous_response_id is not None:
        raise ApiError(
            400, "nothing is kept between requests: send the whole input", param="previous_response_id"
        )
    if r.background:
        raise ApiError(400, "background is not served", param="background")
    tools, skipped = chats.function_tools(r.tools)
    names = [t["function"]["name"] for t in tools]
    chosen = wishes.choice(r.tool_choice, has_tools=bool(tools), names=names)
    if chosen.kind == "none":
        tools = []
    think = wishes.thinking(r, (r.reasoning or {}).get("effort"))
    parallel = r.parallel_tool_calls is not False
    chat = from_responses(r.input, r.instructions)
    prompt = await in_thread(service.model.chat, chat, tools, thinking=think.is_on)
    wanted = (r.text or {}).get("format")
    if wanted is not None and not isinstance(wanted, Mapping):
        raise ApiError(400, "text.format must be an object", param="text")
    constraint = await wishes.constraint(service.grammars, tools, chosen, wanted, parallel=parallel)
    wish = wishes.wish(
        r,
        prompt,
        service.model,
        service.settings,
        key,
        think=think,
        context=service.context,
        max_tokens=r.max_output_tokens,
        schemas=tool_schemas(tools) or None,
        constraint=constraint,
        think_id=None if constraint is None else think_id(service, think),
        one_call=not parallel or chosen.name is not None,
        top=_top(r),
    )
    return place.submit([wish])[0], skipped


LOGPROBS = "message.output_text.logprobs"
"""What ``include`` names to get log-probabilities."""


def _top(r: ResponsesRequest) -> int | None:
    """Rivals of each token that are wanted; None where no scores are."""
    if r.top_logprobs is None and LOGPROBS not in (r.include or ()):
        return None
    return r.top_logprobs or 0


def from_responses(given: str | list[Any], instructions: str | None) -> list[dict[str, Any]]:
    """Input items in the form that templates read: reasoning and calls join the assistant's turn.

    Raises:
      MessageError: naming the place.
    """
    found: list[dict[str, Any]] = [{"role": "system", "content": instructions}] if instructions else []
    items = [{"role": "user", "content": given}] if isinstance(given, str) else given
    turn: dict[str, Any] | None = None  # the assistant's, which several items make up
    for i, item in enumerate(items):
        if not isinstance(item, Mapping):
            raise MessageError(f"input[{i}] must be an object")
        is_assistant = item.get("role") == "assistant" or item.get("type") in ("function_call", "reasoning")
        if not is_assistant:
            turn = None
            found += _of_item(item, f"input[{i}]")
            continue
        if turn is None:
            turn = {"role": "assistant", "content": ""}
            found.append(turn)
        _join(turn, item, f"input[{i}]")
    if not any(m["role"] != "system" for m in found):
        raise MessageError("input is empty: a chat needs at least one message")
    return chats.with_one_system(found)


def _of_item(item: Mapping[str, Any], place: str) -> list[dict[str, Any]]:
    kind = item.get("type", "message")
    if kind == "function_call_output":
        content = chats.text_of(item.get("output"), f"{place}.output")
        return [{"role": "tool", "content": content, "tool_call_id": str(item.get("call_id"))}]
    if kind != "message":
        return []  # calls of tools that are no functions, and their results
    role = chats.role_of(item, {"developer": "system"})
    if role not in ("system", "user"):
        raise MessageError(f"{place}.role must be one of system, developer, user, assistant")
    return [{"role": role, "content": chats.text_of(item.get("content"), f"{place}.content")}]


def _join(turn: dict[str, Any], item: Mapping[str, Any], place: str) -> None:
    kind = item.get("type", "message")
    if kind == "function_call":
        function = {"name": item.get("name"), "arguments": item.get("arguments") or "{}"}
        call = {"id": str(item.get("call_id")), "type": "function", "function": function}
        turn.setdefault("tool_calls", []).append(call)
    elif kind == "reasoning":
        texts = [chats.text_of(item.get(name), f"{place}.{name}") for name in ("content", "summary")]
        turn["reasoning_content"] = turn.get("reasoning_content", "") + "".join(texts)
    else:
        turn["content"] += chats.text_of(item.get("content"), f"{place}.content")


class Reply:
    """An answer in the form of responses: items of reasoning, message and function calls."""

    def __init__(self, service: Service, r: ResponsesRequest, answer: Answer):
        self._service, self._r, self._answer = service, r, answer
        self._id, self._created = f"resp_{uuid4().hex}", int(time.time())
        self._items: list[dict[str, Any]] = []
        self._number = -1
        self._reported = logprobs.Reported(service, answer)

    def _response(self, status: str, error: dict[str, Any] | None = None) -> dict[str, Any]:
        r, usage = self._r, self._answer.usage
        is_cut = self._answer.finish_reason == "length"
        counts = {
            "input_tokens": usage.prompt,
            "input_tokens_details": {"cached_tokens": usage.cached, "cache_write_tokens": 0},
            "output_tokens": usage.completion,
            "output_tokens_details": {"reasoning_tokens": usage.reasoning},
            "total_tokens": usage.prompt + usage.completion,
        }
        return {
            "id": self._id,
            "object": "response",
            "created_at": self._created,
            "status": "incomplete" if is_cut and status == "completed" else status,
            "error": error,
            "incomplete_details": {"reason": "max_output_tokens"} if is_cut else None,
            "instructions": r.instructions,
            "max_output_tokens": r.max_output_tokens,
            "model": self._service.name,
            "output": [dict(item) for item in self._items],
            "parallel_tool_calls": r.parallel_tool_calls is not False,
            "previous_response_id": None,
            "reasoning": {"effort": (r.reasoning or {}).get("effort"), "summary": None},
            "store": False,
            "temperature": self._answer.wish.sampling.temperature,
            "text": {"format": (r.text or {}).get("format") or {"type": "text"}},
            "tool_choice": r.tool_choice or "auto",
            "tools": r.tools or [],
            "top_p": self._answer.wish.sampling.top_p,
            "truncation": "disabled",
            "usage": counts if status != "in_progress" else None,
            "metadata": r.metadata or {},
        }

    async def whole(self) -> dict[str, Any]:
        """The reply that does not stream."""
        try:
            for delta in await self._answer.whole():
                list(self._take(delta))
            await logprobs.complete(self._service, self._answer)
            list(self._end_item())
        finally:
            self._answer.close()
        self._service.finished(self._answer)
        return self._response("completed")

    async def events(self) -> AsyncGenerator[bytes]:
        """The reply as it is written."""
        try:
            for name in ("response.created", "response.in_progress"):
                yield self._event(name, {"response": self._response("in_progress")})
            async for delta in self._answer:
                for name, fields in self._take(delta):
                    yield self._event(name, fields)
            await logprobs.complete(self._service, self._answer)
            for name, fields in self._end_item():
                yield self._event(name, fields)
            self._service.finished(self._answer)
            name = "incomplete" if self._answer.finish_reason == "length" else "completed"
            yield self._event(f"response.{name}", {"response": self._response("completed")})
        except Exception as error:
            found = as_api_error(error)
            shown = found or ApiError(500, "the server failed")
            body = {"code": "server_error", "message": shown.message}
            yield self._event("response.failed", {"response": self._response("failed", body)})
            if found is None:
                raise
        finally:
            self._answer.close()

    def _event(self, name: str, fields: dict[str, Any]) -> bytes:
        self._number += 1
        return event(name, {"type": name, "sequence_number": self._number, **fields})

    # -- items: each begins, grows and ends; the events of all three

    def _take(self, delta: Delta):
        kind = _item_kind(delta)
        is_new = not self._items or self._items[-1]["type"] != kind or isinstance(delta, CallStart)
        if is_new:
            yield from self._end_item()
            yield from self._begin_item(delta)
        if isinstance(delta, CallStart) or not delta.text:
            return
        item, place = self._items[-1], self._place
        if kind == "function_call":
            item["arguments"] += delta.text
            yield "response.function_call_arguments.delta", {**place, "delta": delta.text}
            return
        item["content"][0]["text"] += delta.text
        name = "response.reasoning_text.delta" if kind == "reasoning" else "response.output_text.delta"
        extra = {} if kind == "reasoning" else {"logprobs": self._new_scores(item)}
        yield name, {**place, "content_index": 0, "delta": delta.text, **extra}

    def _new_scores(self, item: dict[str, Any]) -> list[dict[str, Any]]:
        """Scores that have come since the last ones, kept with the item's text."""
        new = self._reported.entries()
        if item["type"] == "message":
            item["content"][0]["logprobs"] += new
        return new

    @property
    def _place(self) -> dict[str, Any]:
        return {"item_id": self._items[-1]["id"], "output_index": len(self._items) - 1}

    def _begin_item(self, delta: Delta):
        item = _new_item(delta)
        self._items.append(item)
        shown = {**item, "content": []} if "content" in item else dict(item)
        yield "response.output_item.added", {"output_index": len(self._items) - 1, "item": shown}
        if "content" in item:
            part = {**self._place, "content_index": 0, "part": dict(item["content"][0])}
            yield "response.content_part.added", part

    def _end_item(self):
        if not self._items or self._items[-1]["status"] == "completed":
            return
        item, place = self._items[-1], self._place
        item["status"] = "completed"
        self._new_scores(item)
        if item["type"] == "function_call":
            done = {**place, "name": item["name"], "arguments": item["arguments"]}
            yield "response.function_call_arguments.done", done
        else:
            part = dict(item["content"][0])
            name = "reasoning_text" if item["type"] == "reasoning" else "output_text"
            extra = {} if item["type"] == "reasoning" else {"logprobs": part["logprobs"]}
            yield f"response.{name}.done", {**place, "content_index": 0, "text": part["text"], **extra}
            yield "response.content_part.done", {**place, "content_index": 0, "part": part}
        yield "response.output_item.done", {"output_index": place["output_index"], "item": dict(item)}


def _item_kind(delta: Delta) -> str:
    if isinstance(delta, Text):
        return "message"
    return "reasoning" if isinstance(delta, Reasoning) else "function_call"


def _new_item(delta: Delta) -> dict[str, Any]:
    if isinstance(delta, CallStart):
        return {
            "id": f"fc_{uuid4().hex[:24]}",
            "type": "function_call",
            "status": "in_progress",
            "call_id": call_id(),
            "name": delta.name,
            "arguments": "",
        }
    if isinstance(delta, Reasoning):
        part = {"type": "reasoning_text", "text": ""}
        head = {"id": f"rs_{uuid4().hex[:24]}", "type": "reasoning", "status": "in_progress"}
        return {**head, "summary": [], "content": [part], "encrypted_content": None}
    part = {"type": "output_text", "text": "", "annotations": [], "logprobs": []}
    head = {"id": f"msg_{uuid4().hex[:24]}", "type": "message", "status": "in_progress"}
    return {**head, "role": "assistant", "content": [part]}
