"""Messages of every protocol to the form that chat templates read.

Clients send what templates refuse: system messages late or several, roles that no template knows, parts in
place of text. Here it becomes ``role``, ``content`` as text, ``reasoning_content``, ``tool_calls`` and
``tool_call_id``.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from qwen3_moe_jax.serve.text_model import without_billing_header
from qwen3_moe_jax.text.chat_template import MessageError

TEXT_PARTS = ("text", "input_text", "output_text", "summary_text", "reasoning_text")
LATE_SYSTEM = "[system message] "
"""Before a system message that comes after others: templates allow one, at the beginning."""


def text_of(content: object, path: str) -> str:
    """Content as text: a string, parts of text, or None.

    Raises:
      MessageError: a part is no text.
    """
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    if not isinstance(content, Sequence):
        raise MessageError(f"{path} must be a string or a list of text parts")
    return "".join(_part_text(part, f"{path}[{i}]") for i, part in enumerate(content))


def _part_text(part: object, path: str) -> str:
    if isinstance(part, str):
        return part
    fields: Mapping[str, Any] = part if isinstance(part, Mapping) else {}
    kind = fields.get("type")
    text = fields.get("refusal" if kind == "refusal" else "text")
    if kind not in (*TEXT_PARTS, "refusal") or not isinstance(text, str):
        raise MessageError(f"{path}: the model reads text only, not {str(kind)[:40]!r}")
    return text


def from_chat(messages: Sequence[Any]) -> list[dict[str, Any]]:
    """OpenAI's chat messages.

    Raises:
      MessageError: naming the place.
    """
    if not messages:
        raise MessageError("messages is empty: a chat needs at least one")
    return with_one_system([_chat_message(m, f"messages[{i}]") for i, m in enumerate(messages)])


def role_of(message: Mapping[str, Any], others: Mapping[str, str]) -> object:
    """A message's role, a name of ``others`` as what it stands for; it may be anything that JSON has."""
    role = message.get("role")
    return others.get(role, role) if isinstance(role, str) else role


def _chat_message(message: object, path: str) -> dict[str, Any]:
    if not isinstance(message, Mapping):
        raise MessageError(f"{path} must be an object with role and content")
    role = role_of(message, {"function": "tool", "developer": "system"})
    if role not in ("system", "user", "assistant", "tool"):
        raise MessageError(f"{path}.role must be one of system, developer, user, assistant, tool")
    if role != "assistant" and message.get("content") is None:
        raise MessageError(f"{path}.content is missing")
    found: dict[str, Any] = {"role": role, "content": text_of(message.get("content"), f"{path}.content")}
    if role == "assistant":
        reasoning = message.get("reasoning_content") or message.get("reasoning")
        if isinstance(reasoning, str):
            found["reasoning_content"] = reasoning
        calls = message.get("tool_calls")
        if calls is not None and not isinstance(calls, list):
            raise MessageError(f"{path}.tool_calls must be a list")
        known = [c for c in calls or () if not isinstance(c, Mapping) or c.get("type") != "custom"]
        if known:
            found["tool_calls"] = known
    if role == "tool" and isinstance(message.get("tool_call_id"), str):
        found["tool_call_id"] = message["tool_call_id"]
    return found


def with_one_system(messages: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The leading system messages as one; a later one becomes a user's turn with a note."""
    head: list[str] = []
    rest: list[dict[str, Any]] = []
    for message in messages:
        if message["role"] != "system":
            rest.append(message)
        elif rest:
            rest.append({"role": "user", "content": LATE_SYSTEM + message["content"]})
        else:
            head.append(without_billing_header(message["content"]))
    system = "\n\n".join(text for text in head if text)
    return ([{"role": "system", "content": system}] if system else []) + rest


def function_tools(tools: Sequence[Any] | None) -> tuple[list[dict[str, Any]], list[str]]:
    """Tools in OpenAI's chat form, and the types of those that are left out because they are no functions.

    Raises:
      MessageError: a function without a name.
    """
    kept: list[dict[str, Any]] = []
    skipped: list[str] = []
    for i, tool in enumerate(tools or ()):
        if not isinstance(tool, Mapping):
            raise MessageError(f"tools[{i}] must be an object")
        kind = tool.get("type", "function")
        if kind not in ("function", "custom") or (kind == "custom" and "input_schema" not in tool):
            skipped.append(str(kind)[:40])
            continue
        function = tool.get("function", tool)
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
            raise MessageError(f"tools[{i}] needs a function with a name")
        parameters = function.get("parameters") or function.get("input_schema")
        if parameters is not None and not isinstance(parameters, Mapping):
            raise MessageError(f"tools[{i}].parameters must be an object")
        description = function.get("description")
        kept.append(
            {
                "type": "function",
                "function": {
                    "name": function["name"],
                    "description": description if isinstance(description, str) else "",
                    "parameters": dict(parameters or {"type": "object", "properties": {}}),
                },
            }
        )
    return kept, skipped
