"""POST /v1/messages and /v1/messages/count_tokens: Anthropic's protocol."""

import json
from collections.abc import AsyncGenerator, Mapping
from typing import Any
from uuid import uuid4

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from qwen3_moe_jax.serve import messages as chats
from qwen3_moe_jax.serve.generation import Answer, Delta, Reasoning, Usage, text_of
from qwen3_moe_jax.serve.http import wishes
from qwen3_moe_jax.serve.http.chat import think_id
from qwen3_moe_jax.serve.http.errors import ApiError, as_api_error
from qwen3_moe_jax.serve.http.schemas import CountTokensRequest, MessagesRequest
from qwen3_moe_jax.serve.http.state import Place, Service, in_thread
from qwen3_moe_jax.serve.http.streams import EventStream, event, until_gone
from qwen3_moe_jax.serve.tools import CallStart, Text, tool_schemas
from qwen3_moe_jax.text.chat_template import MessageError


async def messages(request: Request) -> Response:
    """Anthropic's chat."""
    service: Service = request.app.state.service
    r = service.parse(request, MessagesRequest)
    with service.place() as place:
        answer, skipped = await until_gone(request.receive, _prepare(service, place, r, request.state.key))
    headers = {"request-id": request.state.request_id}
    headers |= wishes.skipped_header(skipped)
    reply = Reply(service, answer)
    if r.stream:
        return EventStream(reply.events(request.state.request_id), service.settings, headers)
    return JSONResponse(await until_gone(request.receive, reply.whole()), headers=headers)


async def count_tokens(request: Request) -> Response:
    """Tokens that a request's prompt has."""
    service: Service = request.app.state.service
    r = service.parse(request, CountTokensRequest)
    tools, _ = chats.function_tools(r.tools)
    chat = from_anthropic(r.messages, r.system)
    prompt = await in_thread(service.model.chat, chat, tools, thinking=_thinking(r.thinking).is_on)
    return JSONResponse({"input_tokens": len(prompt.token_ids)})


async def _prepare(service: Service, place: Place, r: MessagesRequest, key: str) -> tuple[Answer, list[str]]:
    wishes.refuse_what_is_missing(r)
    tools, skipped = chats.function_tools(r.tools)
    names = [t["function"]["name"] for t in tools]
    chosen = wishes.choice(r.tool_choice, has_tools=bool(tools), names=names)
    if chosen.kind == "none":
        tools = []
    config = r.output_config or {}
    think = _thinking(r.thinking, config.get("effort"))
    parallel = not (r.tool_choice or {}).get("disable_parallel_tool_use", False)
    chat = from_anthropic(r.messages, r.system)
    prompt = await in_thread(service.model.chat, chat, tools, thinking=think.is_on)
    wanted = config.get("format")
    if wanted is not None and not isinstance(wanted, Mapping):
        raise ApiError(400, "output_config.format must be an object", param="output_config")
    constraint = await wishes.constraint(service.grammars, tools, chosen, wanted, parallel=parallel)
    wish = wishes.wish(
        r,
        prompt,
        service.model,
        service.settings,
        key,
        think=think,
        context=service.context,
        stop=wishes.stops(r.stop_sequences, service.settings),
        max_tokens=r.max_tokens,
        schemas=tool_schemas(tools) or None,
        constraint=constraint,
        think_id=None if constraint is None else think_id(service, think),
        one_call=not parallel or chosen.name is not None,
    )
    return place.submit([wish])[0], skipped


def _thinking(given: Mapping[str, Any] | None, effort: object = None) -> wishes.Thinking:
    """``{"type": "enabled", "budget_tokens": n}``, "adaptive" or "disabled"; else the model's default."""
    kind = (given or {}).get("type")
    if kind == "disabled":
        return wishes.Thinking(False)
    if kind not in (None, "enabled", "adaptive"):
        raise ApiError(400, "thinking.type must be enabled, adaptive or disabled", param="thinking")
    budget = (given or {}).get("budget_tokens")
    if budget is not None and (type(budget) is not int or budget < 1):
        raise ApiError(400, "thinking.budget_tokens must be a positive number", param="thinking")
    if budget is None and isinstance(effort, str):
        budget = wishes.EFFORT_BUDGETS.get(effort)
    return wishes.Thinking(True if kind == "enabled" else None, budget)


def from_anthropic(given: list[Any], system: object) -> list[dict[str, Any]]:
    """Anthropic's messages in the form that templates read.

    Raises:
      MessageError: naming the place.
    """
    found: list[dict[str, Any]] = []
    if system:
        blocks = system if isinstance(system, list) else [system]
        texts = [
            chats.text_of([b] if not isinstance(b, str) else b, f"system[{i}]") for i, b in enumerate(blocks)
        ]
        found += [{"role": "system", "content": text} for text in texts]
    for i, message in enumerate(given):
        found += _of_message(message, f"messages[{i}]")
    if not any(m["role"] != "system" for m in found):
        raise MessageError("messages is empty: a chat needs at least one")
    return chats.with_one_system(found)


def _of_message(message: object, place: str) -> list[dict[str, Any]]:
    if not isinstance(message, Mapping):
        raise MessageError(f"{place} must be an object with role and content")
    role, content = message.get("role"), message.get("content")
    if role not in ("user", "assistant", "system"):
        raise MessageError(f"{place}.role must be user or assistant")
    if isinstance(content, str):
        return [{"role": role, "content": content}]
    if not isinstance(content, list):
        raise MessageError(f"{place}.content must be a string or a list of blocks")
    if role == "assistant":
        return [_of_assistant(content, place)]
    return _of_user(role, content, place)


def _of_assistant(blocks: list[Any], place: str) -> dict[str, Any]:
    text, reasoning, calls = [], [], []
    for i, block in enumerate(blocks):
        kind = block.get("type") if isinstance(block, Mapping) else None
        if kind == "thinking":
            reasoning.append(str(block.get("thinking", "")))
        elif kind == "tool_use":
            function = {"name": block.get("name"), "arguments": block.get("input") or {}}
            calls.append({"id": block.get("id"), "type": "function", "function": function})
        elif kind != "redacted_thinking":
            text.append(chats.text_of([block], f"{place}.content[{i}]"))
    found: dict[str, Any] = {"role": "assistant", "content": "".join(text)}
    found |= {"reasoning_content": "".join(reasoning)} if reasoning else {}
    return found | ({"tool_calls": calls} if calls else {})


def _of_user(role: str, blocks: list[Any], place: str) -> list[dict[str, Any]]:
    """Results of tools are messages of their own, before what the user says."""
    results, text = [], []
    for i, block in enumerate(blocks):
        where = f"{place}.content[{i}]"
        if isinstance(block, Mapping) and block.get("type") == "tool_result":
            content = chats.text_of(block.get("content"), f"{where}.content")
            results.append(
                {"role": "tool", "content": content, "tool_call_id": str(block.get("tool_use_id"))}
            )
        else:
            text.append(chats.text_of([block], where))
    said = [{"role": role, "content": "\n".join(text)}] if text else []
    return results + said


_REASONS = {"stop": "end_turn", "length": "max_tokens", "tool_calls": "tool_use"}


def _usage(usage: Usage) -> dict[str, int]:
    return {
        "input_tokens": usage.prompt - usage.cached,
        "cache_read_input_tokens": usage.cached,
        "cache_creation_input_tokens": 0,
        "output_tokens": usage.completion,
    }


class Reply:
    """An answer in the form of Anthropic's messages."""

    def __init__(self, service: Service, answer: Answer):
        self._service, self._answer = service, answer
        self._index, self._kind = -1, ""

    def _message(self, content: list[dict[str, Any]]) -> dict[str, Any]:
        is_over = self._answer.finish_reason is not None
        return {
            "id": f"msg_{uuid4().hex[:24]}",
            "type": "message",
            "role": "assistant",
            "model": self._service.name,
            "content": content,
            **(self._end() if is_over else {"stop_reason": None, "stop_sequence": None}),
            "usage": _usage(self._answer.usage),
        }

    def _end(self) -> dict[str, Any]:
        reason = self._answer.finish_reason
        assert reason is not None  # the answer was read to its end
        reason = _REASONS[reason]
        if self._answer.stop_string is not None:
            reason = "stop_sequence"
        return {"stop_reason": reason, "stop_sequence": self._answer.stop_string}

    async def whole(self) -> dict[str, Any]:
        """The reply that does not stream."""
        blocks: list[dict[str, Any]] = []
        try:
            for delta in await self._answer.whole():
                kind = _block_kind(delta)
                if not blocks or isinstance(delta, CallStart) or blocks[-1]["type"] != kind:
                    blocks.append(_block(delta))
                blocks[-1][_FIELD[kind]] += text_of(delta)
        finally:
            self._answer.close()
        self._service.finished(self._answer)
        for block in blocks:
            if block["type"] == "tool_use":
                block["input"] = _object(block["input"])
        return self._message(blocks)

    async def events(self, request_id: str) -> AsyncGenerator[bytes]:
        """The reply as it is written."""
        try:
            yield event("message_start", {"type": "message_start", "message": self._message([])})
            async for delta in self._answer:
                for chunk in self._events_of(delta):
                    yield chunk
            self._service.finished(self._answer)
            if self._index >= 0:
                yield self._stop_block()
            end = {"type": "message_delta", "delta": self._end(), "usage": _usage(self._answer.usage)}
            yield event("message_delta", end)
            yield event("message_stop", {"type": "message_stop"})
        except Exception as error:
            found = as_api_error(error)
            yield event("error", (found or ApiError(500, "the server failed")).anthropic_body(request_id))
            if found is None:
                raise
        finally:
            self._answer.close()

    def _stop_block(self) -> bytes:
        return event("content_block_stop", {"type": "content_block_stop", "index": self._index})

    def _events_of(self, delta: Delta) -> list[bytes]:
        found, kind = [], _block_kind(delta)
        if kind != self._kind or isinstance(delta, CallStart):
            if self._index >= 0:
                found.append(self._stop_block())
            self._index, self._kind = self._index + 1, kind
            block = _block(delta) | ({"input": {}} if kind == "tool_use" else {})
            start = {"type": "content_block_start", "index": self._index, "content_block": block}
            found.append(event("content_block_start", start))
        if text_of(delta):
            piece = {"type": _DELTA[kind], _DELTA_FIELD[kind]: text_of(delta)}
            body = {"type": "content_block_delta", "index": self._index, "delta": piece}
            found.append(event("content_block_delta", body))
        return found


_FIELD = {"text": "text", "thinking": "thinking", "tool_use": "input"}
_DELTA = {"text": "text_delta", "thinking": "thinking_delta", "tool_use": "input_json_delta"}
_DELTA_FIELD = {"text": "text", "thinking": "thinking", "tool_use": "partial_json"}


def _block_kind(delta: Delta) -> str:
    return "text" if isinstance(delta, Text) else "thinking" if isinstance(delta, Reasoning) else "tool_use"


def _block(delta: Delta) -> dict[str, Any]:
    if isinstance(delta, CallStart):
        return {"type": "tool_use", "id": f"toolu_{uuid4().hex[:24]}", "name": delta.name, "input": ""}
    if isinstance(delta, Reasoning):
        return {"type": "thinking", "thinking": "", "signature": ""}
    return {"type": "text", "text": "", "citations": None}


def _object(text: str) -> dict[str, Any]:
    """A call's arguments; what is no object is kept under a name of its own."""
    try:
        value = json.loads(text)
    except ValueError:
        return {"_raw": text}
    return value if isinstance(value, dict) else {"_raw": value}
