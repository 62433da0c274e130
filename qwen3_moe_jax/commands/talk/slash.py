"""What begins with ``/`` in a chat: commands, their help, and what may complete them."""

import argparse
import glob
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from qwen3_moe_jax.commands import options
from qwen3_moe_jax.commands.common import SAMPLING_FIELDS
from qwen3_moe_jax.commands.generate import THINKING
from qwen3_moe_jax.commands.parser import guess_for
from qwen3_moe_jax.commands.talk import saved
from qwen3_moe_jax.commands.talk.clipboard import copy, last_code
from qwen3_moe_jax.commands.talk.saved import VIEWS
from qwen3_moe_jax.core import terminal
from qwen3_moe_jax.core.counted import counted
from qwen3_moe_jax.core.output_file import check_output

if TYPE_CHECKING:
    from qwen3_moe_jax.commands.chat import Chat

SWITCH = {"on": True, "off": False}


class Leave(Exception):
    """The person has had enough."""


@dataclass(frozen=True)
class Command:
    """A command: what it takes, what it does in a few words, and the function that does it."""

    takes: str
    summary: str
    run: Callable[["Chat", str], None]


def parsed(text: str) -> tuple[str, str] | None:
    """The command's name and the rest of a message; None for a message that is no command.

    A command is ``/`` and a word; a path (``/etc/hosts ...``) and ``//`` begin messages.
    """
    found = re.match(r"/([A-Za-z?]\w*)(?:\s+(.*))?\Z", text.strip(), re.DOTALL)
    return (found[1].lower(), (found[2] or "").strip()) if found else None


def literal(text: str) -> str:
    """A message as it is sent: ``//`` at its beginning is one slash."""
    return text[1:] if text.startswith("//") else text


def run_command(chat: "Chat", name: str, argument: str) -> None:
    """Does what a command says; a fault is one line of error.

    Raises:
      Leave: it was /exit.
    """
    name = ALIASES.get(name, name)
    command = COMMANDS.get(name)
    if command is None:
        guess = guess_for(f"/{name}", [f"/{known}" for known in COMMANDS]) or "; /help lists them"
        terminal.error(f"there is no command /{name}{guess}; // begins a message with a slash")
        return
    if argument and not command.takes:
        terminal.error(f"/{name} takes nothing after it; // begins a message with a slash")
        return
    try:
        command.run(chat, argument)
    except (argparse.ArgumentTypeError, ValueError, OSError) as error:
        terminal.error(f"/{name}: {error}")


def _help(chat: "Chat", _: str) -> None:
    width = max(len(f"/{name} {c.takes}") for name, c in COMMANDS.items())
    terminal.note(*(f"{f'/{name} {c.takes}':{width}}  {c.summary}" for name, c in COMMANDS.items()))
    terminal.note(
        "Alt-Enter begins a new line, pasted lines are one message, // sends a slash",
        "Ctrl-C stops an answer, Ctrl-D leaves",
    )


def _system(chat: "Chat", text: str) -> None:
    conversation = chat.conversation
    if text:
        conversation.system = None if text == "-" else text
    terminal.note(f"system: {conversation.system or 'none'}")


def _set(chat: "Chat", argument: str) -> None:
    name, _, value = argument.partition(" ")
    name = SHORT.get(name, name.replace("-", "_"))
    if not name:
        terminal.note(*(f"{name} {_shown(get(chat))}" for name, (get, _) in SETTINGS.items()))
        return
    if name not in SETTINGS:
        raise ValueError(
            f"there is no setting {name}{guess_for(name, SETTINGS) or ': ' + ', '.join(SETTINGS)}"
        )
    get, put = SETTINGS[name]
    if value.strip():
        put(chat, value.strip())
    terminal.note(f"{name} {_shown(get(chat))}")


def _shown(value: object) -> str:
    words = {None: "auto", True: "on", False: "off"}
    return words[value] if value is None or isinstance(value, bool) else str(value)


def _thinking(chat: "Chat", argument: str) -> None:
    if not argument:
        turns = chat.conversation.turns
        terminal.note(*(turns[-1].reasoning if turns else "").splitlines() or ["there was no thinking"])
    elif argument in VIEWS:
        chat.reasoning = argument
        terminal.note(f"thinking: {argument}")
    else:
        chat.thinking = _chosen(THINKING, argument, more=VIEWS)
        terminal.note(f"thinking: {argument}")


def _chosen(words: dict, word: str, more: tuple[str, ...] = ()):
    if word not in words:
        raise ValueError(f"{word!r} is none of {', '.join((*words, *more))}")
    return words[word]


def _undo(chat: "Chat", _: str) -> None:
    turn = chat.conversation.undo()
    terminal.note("there is nothing to undo" if turn is None else f"undone: {_short(turn.question)}")


def _short(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= 60 else f"{line[:57]}..."


def _retry(chat: "Chat", _: str) -> None:
    chat.retry()


def _save(chat: "Chat", argument: str) -> None:
    force = argument.startswith("-f ")
    path = Path(check_output(os.path.expanduser(argument.removeprefix("-f ").strip())))
    if path.is_file() and not force and path.resolve() not in chat.own_files:
        raise ValueError(f"{path} exists: name another file, or /save -f {path}")
    settings = {name: get(chat) for name, (get, _) in SETTINGS.items()}
    settings |= {"chat_template": chat.template} if chat.template else {}
    chat.conversation.save(path, {"settings": settings})
    chat.own_files.add(path.resolve())
    terminal.note(f"saved {counted(len(chat.conversation.turns), 'turn')} to {path}")


def _load(chat: "Chat", argument: str) -> None:
    path = Path(options.path(argument))
    changed = chat.take_up(*saved.load(path))
    chat.own_files.add(path.resolve())
    turns = chat.conversation.turns
    last = f", the last: {_short(turns[-1].question)}" if turns else ""
    new = f"; new settings: {', '.join(changed)}" if changed else ""
    terminal.note(f"loaded {counted(len(turns), 'turn')}{last}{new}")


def _copy(chat: "Chat", argument: str) -> None:
    turns = chat.conversation.turns
    text = turns[-1].answer if turns else None
    if argument:
        text = last_code(_chosen({"code": text or ""}, argument))
    if not text:
        raise ValueError("there is nothing to copy")
    way = copy(text)
    if way is None:
        raise ValueError("there is no clipboard here; /save writes a file")
    terminal.note(f"copied {counted(len(text), 'character')} by {way}")


def _stats(chat: "Chat", _: str) -> None:
    terminal.note(*chat.stats())


def _reset(chat: "Chat", _: str) -> None:
    chat.conversation.reset()


def _exit(chat: "Chat", _: str) -> None:
    raise Leave


COMMANDS = {
    "help": Command("", "this list", _help),
    "system": Command("[TEXT]", "shows or sets the system message; - takes it away", _system),
    "set": Command("[NAME [VALUE]]", "shows or sets sampling, max_tokens, stop, thinking ...", _set),
    "thinking": Command(
        "[on|off|auto|show|fold|hide]", "the model's switch, or the view; alone: the last thinking", _thinking
    ),
    "undo": Command("", "forgets the last message and its answer", _undo),
    "retry": Command("", "answers the last message again, with another seed", _retry),
    "save": Command("FILE", "writes the conversation: JSON, or Markdown for .md", _save),
    "load": Command("FILE", "goes on with a conversation that was saved", _load),
    "copy": Command("[code]", "copies the last answer, or its last block of code", _copy),
    "stats": Command("", "figures of the last answer, and the context in use", _stats),
    "reset": Command("", "forgets the conversation; the system message stays", _reset),
    "exit": Command("", "leaves, as Ctrl-D", _exit),
}

ALIASES = {"quit": "exit", "bye": "exit", "clear": "reset", "new": "reset", "regen": "retry", "?": "help"}

SHORT = {
    "temp": "temperature",
    "n": "max_tokens",
    "num_predict": "max_tokens",
    "repeat_penalty": "repetition_penalty",
}


def _sampling(name: str) -> tuple[Callable, Callable]:
    parse = options.seed if name == "seed" else options.sampling_value(name)

    def put(chat: "Chat", text: str) -> None:
        chat.sampling = replace(chat.sampling, **{name: parse(text)})

    return lambda chat: getattr(chat.sampling, name), put


def _attribute(name: str, parse: Callable[[str], object]) -> tuple[Callable, Callable]:
    return lambda chat: getattr(chat, name), lambda chat, text: setattr(chat, name, parse(text))


SETTINGS: dict[str, tuple[Callable, Callable]] = {
    **{name: _sampling(name) for name in SAMPLING_FIELDS},
    "max_tokens": _attribute("max_tokens", lambda text: None if text == "auto" else options.number(1)(text)),
    "stop": _attribute("stop", lambda text: [] if text == "-" else [options.escaped(text)]),
    "thinking": _attribute("thinking", lambda text: _chosen(THINKING, text)),
    "reasoning": _attribute("reasoning", lambda text: _chosen({view: view for view in VIEWS}, text)),
    "verbose": _attribute("verbose", lambda text: _chosen(SWITCH, text)),
}


def complete(text: str) -> Iterator[tuple[str, int]]:
    """The words that may stand at the end of a line, each with the characters that it replaces."""
    name, space, rest = text.partition(" ")
    if not text.startswith("/") or "\n" in text:
        return
    if not space:
        yield from ((f"/{known}", len(text)) for known in COMMANDS if known.startswith(name[1:]))
    elif name in ("/save", "/load"):
        found = sorted(glob.glob(glob.escape(os.path.expanduser(rest)) + "*"))
        yield from ((path + (os.sep if os.path.isdir(path) else ""), len(rest)) for path in found)
    else:
        words = {"/set": SETTINGS, "/thinking": (*THINKING, *VIEWS), "/copy": ("code",)}.get(name, ())
        yield from ((word, len(rest)) for word in words if word.startswith(rest))
