"""From a request's fields to a wish: sampling, limits, stop strings, thinking, constraints. All protocols."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from qwen3_moe_jax.core.sampling import MIN_TEMPERATURE, Sampling
from qwen3_moe_jax.serve.generation import Wish
from qwen3_moe_jax.serve.grammar import Constraint, Grammars
from qwen3_moe_jax.serve.http.errors import ApiError
from qwen3_moe_jax.serve.http.schemas import Common
from qwen3_moe_jax.serve.settings import Settings
from qwen3_moe_jax.serve.text_model import Prompt, TextModel
from qwen3_moe_jax.serve.tools import tool_schemas

EFFORT_BUDGETS = {"low": 1024, "medium": 4096, "high": 16384, "xhigh": None, "max": None}
"""Tokens of thinking for OpenAI's words; "none" and "minimal" turn it off."""

ALLOWED_KWARGS = ("enable_thinking", "thinking_budget", "preserve_thinking")


@dataclass(frozen=True)
class Thinking:
    """Whether the model is to think, or None for what its template does, and for how many tokens."""

    is_on: bool | None = None
    budget: int | None = None


@dataclass(frozen=True)
class Choice:
    """Which tools may be called: "auto", "none", "required", or one by name."""

    kind: str = "auto"
    name: str | None = None


def skipped_header(kinds: Sequence[str]) -> dict[str, str]:
    """Names the types of tools that were left out: a client's words, made fit for a header."""
    words = ",".join(kinds)[:200].encode("ascii", "replace").decode()
    return {"x-skipped-tools": "".join(c if c.isprintable() else " " for c in words)} if kinds else {}


def refuse_what_is_missing(r: Common) -> None:
    """400 for fields that are known and not served, unless they ask for nothing."""
    if r.frequency_penalty:
        raise ApiError(400, "frequency_penalty is not served; presence_penalty is", param="frequency_penalty")
    if r.logit_bias:
        raise ApiError(400, "logit_bias is not served", param="logit_bias")


def sampling(r: Common, model: TextModel, thinking: Thinking) -> Sampling:
    """The file's recommendation with what the request says."""
    fields = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty", "presence_penalty", "seed")
    given = {f: getattr(r, f) for f in fields if getattr(r, f) is not None}
    if "temperature" in given:
        given["temperature"] = 0.0 if given["temperature"] < MIN_TEMPERATURE else given["temperature"]
    if "seed" in given:
        given["seed"] = given["seed"] % 2**32
    if given.get("top_k") == -1:
        given["top_k"] = 0
    if given.get("top_p") == 0:
        given |= {"top_p": 1.0, "top_k": 1}
    try:
        return replace(model.sampling(thinking=thinking.is_on), **given)
    except ValueError as error:
        raise ApiError(400, str(error)) from None


def stops(given: str | Sequence[str] | None, settings: Settings) -> tuple[str, ...]:
    """Stop strings, within their limits."""
    found = () if given is None else (given,) if isinstance(given, str) else tuple(given)
    if len(found) > settings.max_stops:
        raise ApiError(400, f"stop: at most {settings.max_stops} strings", param="stop")
    if any(not text or len(text.encode()) > settings.max_stop_bytes for text in found):
        raise ApiError(400, f"stop: strings of 1 to {settings.max_stop_bytes} bytes", param="stop")
    return found


def thinking(r: Common, effort: object = None) -> Thinking:
    """From ``chat_template_kwargs``, ``enable_thinking`` and ``reasoning_effort``, the strongest first."""
    kwargs = r.chat_template_kwargs or {}
    for key, value in kwargs.items():
        if key not in ALLOWED_KWARGS:
            raise ApiError(400, f"chat_template_kwargs.{key[:40]} is not known", param="chat_template_kwargs")
        wanted = int if key == "thinking_budget" else bool
        if type(value) is not wanted:
            raise ApiError(
                400, f"chat_template_kwargs.{key} has the wrong type", param="chat_template_kwargs"
            )
    is_on = kwargs.get("enable_thinking", r.enable_thinking)
    budget = kwargs.get("thinking_budget", r.thinking_budget)
    if is_on is None and isinstance(effort, str):
        is_on = effort not in ("none", "minimal")
        if budget is None:
            budget = EFFORT_BUDGETS.get(effort)
    if budget == 0:
        is_on = False
    return Thinking(is_on, None if is_on is False else budget)


def choice(given: object, *, has_tools: bool, names: Sequence[str] = ()) -> Choice:
    """OpenAI's and Anthropic's ways to say which tools may be called."""
    found = _choice(given)
    if found.name is not None and found.name not in names:
        raise ApiError(400, "tool_choice names a tool that is not among tools", param="tool_choice")
    if found.kind in ("required", "named") and not has_tools:
        raise ApiError(400, "tool_choice asks for a call, and there are no tools", param="tool_choice")
    return found


def _choice(given: object) -> Choice:
    if given is None:
        return Choice()
    if isinstance(given, str):
        word = {"any": "required"}.get(given, given)
        if word in ("auto", "none", "required"):
            return Choice(word)
    if isinstance(given, Mapping):
        function = given.get("function")
        name = given.get("name") or (function.get("name") if isinstance(function, Mapping) else None)
        kind = given.get("type")
        if kind in ("function", "tool") and isinstance(name, str):
            return Choice("named", name)
        if kind in ("auto", "none", "any", "required"):
            return Choice({"any": "required"}.get(kind, kind))
        if kind == "allowed_tools":
            return Choice("required" if given.get("mode") == "required" else "auto")
    raise ApiError(400, "tool_choice must be auto, none, required or a tool's name", param="tool_choice")


async def constraint(
    grammars: Grammars,
    tools: Sequence[Mapping[str, Any]],
    chosen: Choice,
    response_format: Mapping[str, Any] | None,
    *,
    parallel: bool,
) -> Constraint | None:
    """The mask that tool choice or response format ask for."""
    if chosen.kind in ("required", "named"):
        schemas = tool_schemas(tools)
        if chosen.name is not None:
            schemas = {chosen.name: schemas[chosen.name]}
        return await grammars.calls(schemas, many=parallel and chosen.name is None)
    return await _format(grammars, response_format or {"type": "text"})


async def _format(grammars: Grammars, given: Mapping[str, Any]) -> Constraint | None:
    kind = given.get("type")
    if kind == "text":
        return None
    if kind == "json_object":
        return await grammars.json_object()
    if kind == "json_schema":
        inner = given.get("json_schema", given)
        schema = inner.get("schema") if isinstance(inner, Mapping) else None
        if not isinstance(schema, Mapping):
            raise ApiError(400, "response_format.json_schema.schema is missing", param="response_format")
        return await grammars.json_schema(schema)
    raise ApiError(
        400, "response_format.type must be text, json_object or json_schema", param="response_format"
    )


def wish(
    r: Common,
    prompt: Prompt,
    model: TextModel,
    settings: Settings,
    key: str,
    *,
    think: Thinking | None = None,
    context: int,
    **fields: Any,
) -> Wish:
    """The wish of a request with this prompt; ``fields`` as ``Wish``."""
    think = think or Thinking(False)
    count = len(prompt.token_ids)
    if not count:
        raise ApiError(400, "the prompt is empty", param="prompt")
    if count >= context:
        message = f"the prompt has {count} tokens and the context holds {context}: shorten it"
        raise ApiError(400, message, code="context_length_exceeded", param="messages")
    bad = next((t for t in prompt.token_ids if t >= model.vocab_size), None)
    if bad is not None:
        raise ApiError(400, f"token id {bad} is not in 0..{model.vocab_size - 1}", param="prompt")
    reuses = r.cache_prompt is not False
    return Wish(
        token_ids=prompt.token_ids,
        sampling=sampling(r, model, think),
        key=key,
        scope=f"{key}\0{r.cache_salt or ''}" if reuses else None,
        starts_in_reasoning=prompt.starts_in_reasoning,
        thinking_budget=think.budget,
        stop_ids=model.tokenizer.stop_ids,
        queue_seconds=settings.queue_seconds,
        **fields,
    )
