"""``qwen3-moe chat``: a conversation in the terminal."""

import argparse
from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qwen3_moe_jax.commands import options
from qwen3_moe_jax.commands.common import (
    SAMPLING_FIELDS,
    add_model_arguments,
    add_prompt_lookup,
    add_sampling_arguments,
    add_template,
    load_model,
    sampling_from,
)
from qwen3_moe_jax.commands.generate import AUTO, THINKING, Clock, Figures, add_thinking, written
from qwen3_moe_jax.commands.talk import saved
from qwen3_moe_jax.commands.talk.conversation import Conversation, Message, Turn
from qwen3_moe_jax.commands.talk.editor import keys_unseen, make_editor
from qwen3_moe_jax.commands.talk.saved import VIEWS
from qwen3_moe_jax.commands.talk.screen import Reasoning, make_screen
from qwen3_moe_jax.commands.talk.slash import Leave, complete, literal, parsed, run_command
from qwen3_moe_jax.core import terminal
from qwen3_moe_jax.core.exit_codes import ExitCode
from qwen3_moe_jax.core.explain import explain
from qwen3_moe_jax.core.sampling import SEEDS, Sampling
from qwen3_moe_jax.machine.folders import state_folder
from qwen3_moe_jax.text.chat_template import start_renderer
from qwen3_moe_jax.text.prompts import Opened, rendered
from qwen3_moe_jax.text.stream import Piece, TextStream
from qwen3_moe_jax.text.tokenizer import control_tokens

if TYPE_CHECKING:
    from qwen3_moe_jax.api import Model

HELP = "/help lists the commands, Ctrl-C stops an answer, Ctrl-D or /exit leaves"

FIRST_PROMPT = 64
"""About how many tokens a first message has, with the template's own."""

FIRST_MESSAGE = "hi"
"""What the template is tried with before the load."""

NEARLY_FULL = 0.8
"""From this part of the context on, the chat says how full it is."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--system", type=options.text, metavar="TEXT", help="a system message")
    add_thinking(parser)
    parser.add_argument(
        "--reasoning",
        choices=VIEWS,
        help="what is shown of the thinking: dimmed text (the default), one line, nothing",
    )
    parser.add_argument("--plain", action="store_true", help="text as the model writes it, no Markdown")
    parser.add_argument("--verbose", action="store_true", help="figures after each answer")
    parser.add_argument(
        "--context-full",
        choices=("drop", "stop"),
        default="drop",
        help="drop the oldest turns when the context is full (the default), or refuse the message",
    )
    parser.add_argument("--no-history", action="store_true", help="keep no messages for the next run")
    parser.add_argument("--load", type=options.path, metavar="FILE", help="go on with a saved conversation")
    add_template(parser)
    add_prompt_lookup(parser)
    parser.set_defaults(thinking=None)  # what is not given may come of a file
    add_sampling_arguments(parser)
    add_model_arguments(
        parser, context_help="tokens of the conversation (default: as the file and memory allow)"
    )


def run(args: argparse.Namespace) -> int:
    given, conversation = saved.given_options(args), Conversation()
    if args.load:
        conversation, found = saved.load(Path(args.load))
        vars(args).update(saved.apart(found, vars(args), given))
    conversation.system = args.system
    start_renderer()  # it is up by the time that the model is
    check = partial(_check, conversation, args)
    with load_model(args, context="fit", first_prompt=FIRST_PROMPT, before_weights=check) as model:
        sampling = sampling_from(args, model, thinking=THINKING[args.thinking or AUTO])
        chat = Chat(args, model, sampling, conversation, given)
        if not args.quiet:
            terminal.note(context_line(model, is_given=args.context is not None))
        return chat.run()


def _check(conversation: Conversation, args: argparse.Namespace, opened: Opened) -> None:
    """Refuses a template that cannot render the conversation, and a system message that fills the context."""
    asked: dict[str, Any] = {"template": args.chat_template, "thinking": THINKING[args.thinking or AUTO]}
    metadata = opened.source.metadata
    if conversation.turns:
        rendered(conversation.messages(FIRST_MESSAGE), metadata, control_tokens(metadata), **asked)
    opened.check(Conversation(conversation.system).messages(FIRST_MESSAGE), **asked)


def context_line(model: "Model", *, is_given: bool) -> str:
    """How long a conversation can be, and why."""
    size, maximum = model.runner.max_context, model.config.max_position_embeddings
    reason = (
        "as asked"
        if is_given
        else "all of the file's"
        if size == maximum
        else "as memory allows; see --context"
    )
    return f"context: {size:,} of {maximum:,} tokens ({reason})"


class Chat:
    """A conversation with a model: what the commands of ``talk.slash`` change, and how a message is answered.

    Attributes:
      conversation: the turns.
      sampling, stop, max_tokens, thinking: of the next answer.
      reasoning: the view of the model's thinking, one of VIEWS.
      verbose: whether figures follow each answer.
      template: in place of the model file's, or None.
      own_files: files that this conversation was saved to or loaded from.
    """

    def __init__(
        self,
        args: argparse.Namespace,
        model: "Model",
        sampling: Sampling,
        conversation: Conversation,
        given: Collection[str] = (),
    ):
        self._args, self._model = args, model
        self.conversation, self.sampling = conversation, sampling
        self.stop, self.max_tokens = list(args.stop), args.max_tokens
        self.thinking = THINKING[args.thinking or AUTO]
        self.reasoning: Reasoning = args.reasoning or "show"
        self.verbose, self.template, self._given = args.verbose, args.chat_template, given
        self.own_files: set[Path] = {Path(args.load).resolve()} if args.load else set()
        self._notes: set[str] = set()
        self._last: tuple[Figures, str] | None = None
        self._used, self._is_warned, self._retries = 0, False, 0

    @property
    def template(self) -> str | None:
        return self._model.chat_template

    @template.setter
    def template(self, text: str | None) -> None:
        self._model.chat_template = text

    def take_up(self, conversation: Conversation, found: Mapping[str, Any]) -> list[str]:
        """Goes on with a conversation and its settings, but for those of the command line.

        Returns:
          the settings that are now others.

        Raises:
          ValueError: the template does not render the conversation; nothing has changed then.
        """
        now = {name: getattr(self.sampling, name) for name in SAMPLING_FIELDS}
        now |= {name: getattr(self, name) for name in ("max_tokens", "stop", "reasoning", "verbose")}
        now |= {"chat_template": self.template, "system": self.conversation.system}
        now |= {"thinking": next(word for word, meaning in THINKING.items() if meaning is self.thinking)}
        taken = now | saved.apart(found, now, self._given)
        before, thinking = self.template, THINKING[taken["thinking"]]
        conversation.system = taken["system"] if "system" in self._given else conversation.system
        try:
            self.template = taken["chat_template"]
            self._model.prompt(conversation.messages(FIRST_MESSAGE), thinking=thinking)
        except ValueError:
            self.template = before
            raise
        self.conversation, self.thinking = conversation, thinking
        self.sampling = replace(self.sampling, **{name: taken[name] for name in SAMPLING_FIELDS})
        for name in ("max_tokens", "stop", "reasoning", "verbose"):
            setattr(self, name, taken[name])
        return [name for name in taken if taken[name] != now[name] and name != "system"]

    def run(self) -> int:
        """Answers message after message; returns the exit code."""
        ask = self._make_ask()
        is_leaving = False
        while True:
            try:
                text = ask()
            except KeyboardInterrupt:
                if is_leaving:
                    return ExitCode.INTERRUPTED
                is_leaving = True
                terminal.note("", "Ctrl-C again, Ctrl-D or /exit leaves")
                continue
            is_leaving = False
            if text is None:
                return ExitCode.DONE
            try:
                self.take(text)
            except Leave:
                return ExitCode.DONE
            except KeyboardInterrupt:  # before the answer began, or the second one
                terminal.note("", "stopped: the message is not kept")

    def _make_ask(self) -> Callable[[], str | None]:
        if not terminal.input_on_terminal():
            return _next_line
        if not self._args.quiet:
            terminal.note(HELP)
        folder = None if self._args.no_history else state_folder()
        return make_editor(complete, folder and folder / "chat-history")

    def take(self, text: str) -> None:
        """Does what a message says: a command, or a question to the model.

        Raises:
          Leave: it was /exit.
        """
        command = parsed(text)
        if command:
            run_command(self, *command)
        elif text.strip():
            self._retries = 0
            self._ask(literal(text))

    def retry(self) -> None:
        """Answers the last message again; the answer before stays if this one comes to nothing."""
        turn = self.conversation.undo()
        if turn is None:
            terminal.note("there is nothing to answer again")
            return
        self._retries += 1
        is_answered = False
        try:
            is_answered = self._ask(turn.question)
        finally:
            if not is_answered:
                self.conversation.add(turn)

    def _ask(self, question: str) -> bool:
        """Answers a message; False, after a line of error, where that cannot be: it is then forgotten.

        Whatever ends an answer, no memory or a lost device too, the conversation is kept.
        """
        try:
            return self._make_room(question) and self._answer(question)
        except (ValueError, ArithmeticError, RuntimeError, MemoryError) as error:
            terminal.error(explain(error)[0])
            return False

    def _make_room(self, question: str) -> bool:
        context, conversation = self._model.runner.max_context, self.conversation
        if self._args.context_full == "stop":
            tokens = self._count(conversation.messages(question))
            if conversation.turns and conversation.is_full(tokens, context, self.max_tokens):
                terminal.error(
                    f"the context is full ({tokens:,} of {context:,} tokens with this message): /undo or "
                    "/reset makes room, /save keeps the conversation; --context-full drop drops old turns"
                )
                return False
            return True
        dropped = conversation.make_room(question, self._count, context, self.max_tokens)
        if dropped:
            turns = "turn is" if dropped == 1 else f"{dropped} turns are"
            terminal.note(
                f"note: the context is full: the oldest {turns} not sent any more "
                f"(left: {len(conversation.turns) - conversation.first}); /save still has all"
            )
        return True

    def _count(self, messages: list[Message]) -> int:
        return len(self._model.prompt(messages, thinking=self.thinking)[0])

    def _answer(self, question: str) -> bool:
        """Streams one answer; Ctrl-C keeps what was written."""
        stream = self._model.open_stream(
            self.conversation.messages(question),
            max_tokens=self.max_tokens,
            sampling=replace(self.sampling, seed=(self.sampling.seed + self._retries) % SEEDS),
            stop=self.stop,
            thinking=self.thinking,
            reuse=True,
        )
        self._tell_once(stream.notes)
        said: dict[str, list[str]] = {"content": [], "reasoning": []}
        is_stopped = self._show(stream, said)
        answer, reasoning = "".join(said["content"]), "".join(said["reasoning"])
        if is_stopped and not answer and not reasoning:
            terminal.note("stopped: the message is not kept")
            return False
        self.conversation.add(Turn(question, answer, reasoning))
        self._tell_context(stream)
        return True

    def _show(self, stream: TextStream, said: dict[str, list[str]]) -> bool:
        """Shows an answer and keeps its pieces; whether Ctrl-C ended it."""
        screen, clock = make_screen(self.reasoning, plain=self._args.plain), Clock(self._model.runner)

        def take(piece: Piece) -> None:
            said[piece.kind].append(piece.text)
            screen.take(piece)

        try:
            with keys_unseen():
                is_stopped = written(stream.pieces(), stream, clock, take, quiet=self._args.quiet)
        finally:
            screen.finish()
        self._last = clock.figures(stream), "Ctrl-C" if is_stopped else stream.finish_reason or "an error"
        self._used = stream.prompt_tokens + stream.new_tokens
        if self.verbose:
            terminal.note(*self.stats())
        return is_stopped

    def stats(self) -> list[str]:
        """Figures of the last answer, and how much of the context is in use: one line each."""
        if self._last is None:
            return ["there was no answer yet"]
        figures, ended_by = self._last
        return [figures.in_words(ended_by), f"context: {self._fill()}"]

    def _fill(self) -> str:
        context = self._model.runner.max_context
        return f"{self._used:,} of {context:,} tokens in use ({self._used / context:.0%})"

    def _tell_context(self, stream: TextStream) -> None:
        """Says once that the context is nearly full, and always that it ended an answer."""
        context = self._model.runner.max_context
        if self._used >= context and stream.finish_reason == "length":
            terminal.note("note: the answer ended because the context is full")
        is_near = self._used >= NEARLY_FULL * context
        if is_near and not self._is_warned:
            drops = self._args.context_full == "drop"
            then = "the oldest turns will be dropped" if drops else "messages will be refused"
            terminal.note(f"note: {self._fill()}; when it is full, {then}: /save, /undo, /reset")
        self._is_warned = is_near

    def _tell_once(self, notes: tuple[str, ...]) -> None:
        new = [line for line in notes if line not in self._notes]
        self._notes.update(new)
        terminal.note(*(f"note: {line}" for line in new))


def _next_line() -> str | None:
    """A message from a pipe or a file; one that is not UTF-8 is skipped."""
    try:
        return terminal.read_line()
    except ValueError as error:
        terminal.error(error)
        return ""
