"""Messages to a prompt, through the Jinja template that the model file carries.

The template is untrusted: every one, known or not, is rendered in a child process
(``template_worker``) that is killed when it takes more than 0.5 s of CPU, 256 MiB
or its share of output. One path for all templates means one behaviour to test; a
rendering costs about a millisecond once the child runs.

Message text is untrusted too: ``<|im_end|>`` in it must not end the turn. A mark
around each string would break templates that look at their strings (``startswith``,
``trim``, ``split('</think>')``), so one character is exchanged instead: every ``|``
in a string or key from the caller becomes a symbol that occurs nowhere else, and is
exchanged back after rendering, when its places are known. Control tokens contain
``|``, so one that touches such a place came from a message, or was completed by one,
and ``Tokenizer.encode_chat`` keeps it as text. No template operation that leaves
``|`` alone can tell the difference.

A control token without ``|`` (``<sep>``, ``[INST]``) that the template may write is
followed in the same way, by its own first and last character, but only where a message
has more than half of it: a ``<`` or a ``[`` elsewhere is what it was. However a template
joins two pieces of messages to such a token, one of them has half of it.
"""

import atexit
import contextlib
import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Collection, Mapping, Sequence
from functools import cache
from itertools import islice
from pathlib import Path
from typing import IO, Any

from qwen3_moe_jax.text.rendered_chat import RenderedChat
from qwen3_moe_jax.text.template_worker import CPU_SECONDS

MAX_INPUT_BYTES = 16 << 20
MAX_ANSWER_BYTES = 256 << 20
MAX_EXTRA_OUTPUT = 1 << 20
DEADLINE_SECONDS = 120.0 if hasattr(signal, "setitimer") else 10.0
"""Of wall-clock time: the backstop where the CPU limit does not work, or the machine is very busy."""

ROLES = ("system", "user", "assistant", "tool")
ROLE_NAMES = {"developer": "system", "function": "tool"}
"""Roles by other names of OpenAI's interface, where the template does not know them."""

_CHAT_WORDS = (
    "role content system user assistant tool developer function reasoning_content name tool_call_id "
    "tool_calls type arguments id messages tools parameters properties required description"
)

_MASKED = "|"
_MASKS = [chr(c) for r in ((0x4DC0, 0x4E00), (0x1F030, 0x1F094), (0xE000, 0xF900)) for c in range(*r)]
"""Stand-ins for ``|``: hexagrams, dominoes, private use. The first two print, so ``repr`` keeps them."""


class TemplateError(ValueError):
    """The chat template is missing, broken or harmful, or refuses the messages.

    Attributes:
      line: of the template, or None where that is not known.
    """

    def __init__(self, message: str, *, line: int | None = None):
        self.line = line
        where = "chat template" if line is None else f"chat template, line {line}"
        super().__init__(f"{where}: {message}")


class MessageError(ValueError):
    """Messages or tools are not what a chat is made of; the text names the place."""


def find_template(metadata: Mapping[str, object]) -> str:
    """The chat template of a model file.

    Raises:
      TemplateError: the file has none.
    """
    template = metadata.get("tokenizer.chat_template")
    if not isinstance(template, str) or not template.strip():
        raise TemplateError("the model file has none: give one, or use generate with plain text")
    return template


def special_tokens(metadata: Mapping[str, object]) -> dict[str, str]:
    """``bos_token``, ``eos_token`` and ``pad_token``, as templates may name them."""
    tokens: Any = metadata.get("tokenizer.ggml.tokens")
    if not isinstance(tokens, list):  # of a vocabulary that is not checked yet
        return {}
    keys = {"bos_token": "bos", "eos_token": "eos", "pad_token": "padding"}
    ids = {name: metadata.get(f"tokenizer.ggml.{key}_token_id") for name, key in keys.items()}
    return {name: tokens[i] for name, i in ids.items() if isinstance(i, int) and 0 <= i < len(tokens)}


def has_thinking_switch(template: str) -> bool:
    """Whether the template reads ``enable_thinking``."""
    return "enable_thinking" in template


def render_chat(
    template: str,
    messages: Sequence[Mapping[str, object]],
    tools: Sequence[Mapping[str, object]] | None = None,
    *,
    add_generation_prompt: bool = True,
    enable_thinking: bool | None = None,
    special: Mapping[str, str] | None = None,
    control_tokens: Collection[str] = (),
) -> RenderedChat:
    """Renders messages with a chat template.

    Args:
      template: Jinja source, trusted no more than the file it came from.
      messages: OpenAI's form: ``role`` (system, developer, user, assistant, tool), ``content``, and for
        the assistant ``reasoning_content`` and ``tool_calls`` (arguments as a dict or as JSON text; what
        is neither reaches the template as one argument, and a note says so).
      tools: function definitions, in OpenAI's form or as bare functions.
      add_generation_prompt: end with the opening of the assistant's turn.
      enable_thinking: given to the template; None leaves the template's default.
      special: ``special_tokens(metadata)``.
      control_tokens: the vocabulary's.

    Raises:
      MessageError: messages or tools are malformed.
      TemplateError: the template is broken, refuses the messages, or goes over its limits.
    """
    notes: list[str] = []
    given = _list(messages, "messages")
    chat = {
        "messages": [_check_message(m, f"messages[{i}]", template, notes) for i, m in enumerate(given)],
        "tools": check_tools(tools or []) or None,
    }
    if not chat["messages"]:
        raise MessageError("messages is empty: a chat needs at least one")
    special = special or {}
    settings = {"documents": None, "add_generation_prompt": add_generation_prompt, **special}
    if enable_thinking is not None:
        settings["enable_thinking"] = enable_thinking
        if not has_thinking_switch(template):
            notes.append("this model's chat template has no thinking switch: the setting has no effect")
    tracked = _tracked(control_tokens, (template, *special.values()))
    chat_json = _to_json(chat)
    masked = {_MASKED, *(token[0] for token in tracked), *(token[-1] for token in tracked)}
    chosen = _choose_masks(len(masked), template, chat_json, *special.values())
    masks = dict(zip(sorted(masked), chosen, strict=True))
    if tracked:
        chat_json = _to_json(_hide_tokens(chat, tracked, masks))
    text = _renderer().render(
        {
            "template": template,
            # in JSON text "|" stands in strings and keys alone
            "chat": chat_json.replace(_MASKED, masks[_MASKED]),
            "settings": settings,
            "masks": list(masks.values()),
            "max_output": MAX_EXTRA_OUTPUT + 2 * len(chat_json),
        }
    )
    inert = tuple(match.start() for match in re.finditer(f"[{''.join(masks.values())}]", text))
    shown = text.translate({ord(mask): character for character, mask in masks.items()})
    return RenderedChat(shown, inert, tuple(notes), frozenset(tracked))


def _tracked(control_tokens: Collection[str], sources: Sequence[str]) -> list[str]:
    """Control tokens without ``|`` that these texts have: those that the template may write.

    Not those that are words of a chat itself, such as ``user``: they stay text.
    """

    def is_word(token: str) -> bool:
        return token[: len(token) // 2 + 1] in _CHAT_WORDS or token[len(token) // 2 :] in _CHAT_WORDS

    found = (t for t in control_tokens if _MASKED not in t and any(t in source for source in sources))
    return [token for token in found if not is_word(token)]


def _hide_tokens(value: object, tokens: Sequence[str], masks: Mapping[str, str]) -> object:
    """The value with a mask for the first or last character of more than half of a token, in its strings."""
    if isinstance(value, str):
        for token in tokens:
            head, tail = token[: len(token) // 2 + 1], token[len(token) // 2 :]
            value = value.replace(head, masks[token[0]] + head[1:])
            value = value.replace(tail, tail[:-1] + masks[token[-1]])
        return value
    if isinstance(value, Mapping):
        return {
            _hide_tokens(key, tokens, masks): _hide_tokens(one, tokens, masks) for key, one in value.items()
        }
    return [_hide_tokens(one, tokens, masks) for one in value] if isinstance(value, list) else value


def start_renderer() -> None:
    """Starts the child process now, so that the first rendering does not wait for it."""
    _renderer().start()


def _list(value: object, path: str) -> Sequence:
    if isinstance(value, str | bytes | Mapping) or not isinstance(value, Sequence):
        raise MessageError(f"{path} must be a list, not {type(value).__name__}")
    return value


def _check_message(message: object, path: str, template: str, notes: list[str]) -> dict[str, object]:
    """The message with the keys that templates read, in the form that they expect."""
    if not isinstance(message, Mapping):
        raise MessageError(f"{path} must be an object with role and content, not {type(message).__name__}")
    role = message.get("role")
    if isinstance(role, str) and role in ROLE_NAMES:
        role = role if f"'{role}'" in template or f'"{role}"' in template else ROLE_NAMES[role]
    elif role not in ROLES:
        raise MessageError(f"{path}.role must be one of {', '.join(ROLES)}, developer, not {role!r}")
    checked: dict[str, object] = {"role": role, "content": _check_content(message, path)}
    for key in ("reasoning_content", "name", "tool_call_id"):
        value = message.get(key)
        if value is not None:
            if not isinstance(value, str):
                raise MessageError(f"{path}.{key} must be a string, not {type(value).__name__}")
            checked[key] = value
    if message.get("tool_calls"):
        if role != "assistant":
            raise MessageError(f"{path}.tool_calls belongs to the assistant, not to role {role!r}")
        calls = _list(message["tool_calls"], f"{path}.tool_calls")
        checked["tool_calls"] = [
            _check_call(call, f"{path}.tool_calls[{i}]", notes) for i, call in enumerate(calls)
        ]
    return checked


def _check_content(message: Mapping[str, object], path: str) -> str:
    content = message.get("content")
    if content is None:
        return ""  # a turn of tool calls alone, a tool that answers nothing
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        found = type(content).__name__
        raise MessageError(f"{path}.content must be a string or a list of text parts, not {found}")
    for i, part in enumerate(content):
        is_text = isinstance(part, Mapping) and part.get("type") == "text"
        if not is_text or not isinstance(part.get("text"), str):
            raise MessageError(
                f"{path}.content[{i}] must be a part of type 'text': the model reads text only"
            )
    return "".join(part["text"] for part in content)


def _check_call(call: object, path: str, notes: list[str]) -> dict[str, object]:
    if not isinstance(call, Mapping):
        raise MessageError(f"{path} must be an object, not {type(call).__name__}")
    function = call.get("function", call)
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise MessageError(f"{path} needs a function with a name")
    arguments, problem = _parse_arguments(function.get("arguments"))
    if problem:
        notes.append(f"{path}: {problem}; the model reads them as one argument")
    checked = {"type": "function", "function": {"name": function["name"], "arguments": arguments}}
    return checked | ({"id": call["id"]} if isinstance(call.get("id"), str) else {})


def _parse_arguments(given: object) -> tuple[dict[str, object], str]:
    """A call's arguments as a dict, and what is wrong with them.

    A model that wrote a bad call once must not make the conversation unusable: what is no object
    becomes the one argument ``arguments``.
    """
    if given is None or (isinstance(given, str) and not given.strip()):
        return {}, ""
    arguments, problem = given, ""
    if isinstance(given, str):
        try:
            arguments = json.loads(given, parse_constant=_refuse_constant)
        except (ValueError, RecursionError):
            problem = "its arguments are not JSON"
    if not isinstance(arguments, Mapping):
        return {"arguments": given}, problem or "its arguments are not an object"
    return dict(arguments), ""


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def check_tools(tools: Any) -> list[dict[str, object]]:
    """The function definitions of a chat. Raises MessageError for what is none."""
    return [_check_tool(tool, f"tools[{i}]") for i, tool in enumerate(_list(tools, "tools"))]


def _check_tool(tool: Any, path: str) -> dict[str, object]:
    function = tool.get("function", tool) if isinstance(tool, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise MessageError(f"{path} needs a function with a name")
    return {str(key): value for key, value in tool.items()}


def _to_json(value: object) -> str:
    try:
        text = json.dumps(value, ensure_ascii=False, allow_nan=False)
        text.encode()  # half of a surrogate pair has no UTF-8 form
    except (TypeError, ValueError, RecursionError) as error:
        raise MessageError(f"messages and tools must be plain JSON values: {error}") from error
    return text


def _choose_masks(count: int, *texts: str) -> list[str]:
    used = set().union(*texts)
    masks = list(islice((mask for mask in _MASKS if mask not in used), count))
    if len(masks) < count:
        raise MessageError("messages and template use every symbol that could stand for '|'")
    return masks


class _Renderer:
    """The child process; started at need and anew after each death. One request at a time."""

    def __init__(self):
        self._lock = threading.Lock()
        self._process: _Worker | None = None
        atexit.register(self.close)

    def start(self) -> None:
        with self._lock:
            self._ensure_running()

    def close(self) -> None:
        with self._lock:
            self._discard()

    def render(self, request: Mapping[str, object]) -> str:
        content = json.dumps(request).encode()
        if len(content) > MAX_INPUT_BYTES:
            raise MessageError(f"messages and tools take {len(content)} bytes, more than {MAX_INPUT_BYTES}")
        with self._lock:
            answer = self._ask(content)
        if "error" in answer:
            raise TemplateError(answer["error"], line=answer["line"])
        return answer["text"]

    def _ask(self, content: bytes) -> dict:
        process = self._ensure_running()
        deadline = threading.Timer(DEADLINE_SECONDS, process.kill)
        deadline.daemon = True
        deadline.start()
        try:
            frame = _exchange_frames(process, content)
        except BaseException:  # Ctrl-C too: an answer left in the pipe would be taken for the next one
            self._discard()
            raise
        finally:
            deadline.cancel()
        if frame is None:
            raise TemplateError(_cause_of_death(self._discard()))
        answer = json.loads(frame)
        if answer.get("fatal"):
            self._discard()
        return answer

    def _ensure_running(self) -> "_Worker":
        if self._process is not None and self._process.poll() is not None:
            self._discard()
        if self._process is None:
            self._process = _start_worker()
        return self._process

    def _discard(self) -> int | None:
        """Ends the child; returns its exit status, negative for a signal (an earlier death keeps its own)."""
        process, self._process = self._process, None
        if process is None:
            return None
        process.kill()
        status = process.wait()
        process.answers.close()
        with contextlib.suppress(BrokenPipeError):  # a request that it did not live to read
            process.requests.close()
        return status


@cache
def _renderer_of(process_id: int) -> _Renderer:
    return _Renderer()


def _renderer() -> _Renderer:
    """This process's renderer: a forked child must not share its parent's pipes."""
    return _renderer_of(os.getpid())


class _Worker(subprocess.Popen[bytes]):
    """The child, whose two pipes are there."""

    @property
    def requests(self) -> IO[bytes]:
        assert self.stdin is not None
        return self.stdin

    @property
    def answers(self) -> IO[bytes]:
        assert self.stdout is not None
        return self.stdout


def _start_worker() -> _Worker:
    """Starts the child with nothing but the standard library and Jinja, and next to no environment."""
    specs = [importlib.util.find_spec(name) for name in ("jinja2", "markupsafe")]
    origins = [spec.origin for spec in specs if spec is not None and spec.origin is not None]
    if len(origins) < len(specs):
        raise TemplateError("rendering needs the jinja2 package: pip install jinja2")
    folders = sorted({str(Path(origin).parent.parent) for origin in origins})
    worker = Path(__file__).with_name("template_worker.py")
    kept = ("TZ", "SYSTEMROOT", "LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH")
    try:
        return _Worker(
            [sys.executable or "python3", "-I", "-S", str(worker), *folders],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env={name: os.environ[name] for name in kept if name in os.environ},
            start_new_session=True,  # Ctrl-C in a terminal is not meant for it
        )
    except OSError as error:
        raise TemplateError(f"the process that renders it cannot start: {error}") from error


def _exchange_frames(process: _Worker, content: bytes) -> bytes | None:
    """Sends a request and returns the answer, or None when the child died of it."""
    try:
        process.requests.write(len(content).to_bytes(4, "big") + content)
        process.requests.flush()
    except BrokenPipeError:
        return None
    header = process.answers.read(4)
    size = int.from_bytes(header, "big")
    if len(header) < 4 or size > MAX_ANSWER_BYTES:
        return None
    frame = process.answers.read(size)
    return frame if len(frame) == size else None


def _cause_of_death(status: int | None) -> str:
    if status == -getattr(signal, "SIGPROF", 0):
        return f"it takes more than {CPU_SECONDS} s of CPU time"
    if status == -getattr(signal, "SIGKILL", 0):
        return f"it takes longer than {DEADLINE_SECONDS:g} s"
    return f"the process that renders it ended with status {status}"
