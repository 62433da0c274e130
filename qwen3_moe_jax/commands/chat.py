"""``qwen3-moe chat``: a conversation in the terminal."""

import argparse

from qwen3_moe_jax.commands import options
from qwen3_moe_jax.commands.common import (
    add_model_arguments,
    add_sampling_arguments,
    load_model,
    sampling_from,
)
from qwen3_moe_jax.commands.generate import THINKING, Clock, add_thinking, written
from qwen3_moe_jax.core import terminal
from qwen3_moe_jax.core.exit_codes import ExitCode
from qwen3_moe_jax.text.chat_template import start_renderer

HELP = "/reset forgets the conversation, /exit or Ctrl-D ends, Ctrl-C stops an answer"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--system", type=options.text, metavar="TEXT", help="a system message")
    add_thinking(parser)
    add_sampling_arguments(parser)
    add_model_arguments(parser)


def run(args: argparse.Namespace) -> int:
    start_renderer()  # it is up by the time that the model is
    with load_model(args) as model:
        sampling = sampling_from(args, model, thinking=THINKING[args.thinking])
        return Conversation(args, model, sampling).run()


class Conversation:
    """Messages so far, and what is done with the next line."""

    def __init__(self, args: argparse.Namespace, model, sampling):
        self._args, self._model, self._sampling = args, model, sampling
        self._start = [{"role": "system", "content": args.system}] if args.system else []
        self.messages = list(self._start)
        self._notes: set[str] = set()

    def run(self) -> int:
        """Answers line after line; returns the exit code."""
        if terminal.input_on_terminal() and not self._args.quiet:
            terminal.note(HELP)
        is_leaving = False
        while True:
            try:
                text = self._next()
            except KeyboardInterrupt:
                if is_leaving:
                    return ExitCode.INTERRUPTED
                is_leaving = True
                terminal.note("", "Ctrl-C again, Ctrl-D or /exit leaves")
                continue
            is_leaving = False
            if text is None or text.strip() == "/exit":
                return ExitCode.DONE
            try:
                self._take(text)
            except KeyboardInterrupt:  # before the answer began, or the second one
                terminal.note("", "stopped: the message is not kept")

    def _next(self) -> str | None:
        if terminal.input_on_terminal():
            return terminal.ask("> ")
        try:
            return terminal.read_line()
        except ValueError as error:
            terminal.error(error)
            return ""

    def _take(self, text: str) -> None:
        command = text.strip()
        if not command:
            return
        if command == "/reset":
            self.messages = list(self._start)
        elif command.startswith("/") and " " not in command and command.count("/") == 1:
            terminal.error(f"there is no command {command}; {HELP}")
        else:
            self._answer(text)

    def _answer(self, text: str) -> None:
        """Streams one answer; Ctrl-C keeps what was written. A question without an answer is forgotten."""
        asked = [*self.messages, {"role": "user", "content": text}]
        try:
            stream = self._model.open_stream(
                asked,
                max_tokens=self._args.max_tokens,
                sampling=self._sampling,
                stop=self._args.stop,
                thinking=THINKING[self._args.thinking],
            )
            self._tell_once(stream.notes)
            answer, _ = written(stream, Clock(self._model.runner), show=True, quiet=self._args.quiet)
        except (ValueError, ArithmeticError) as error:
            terminal.error(error)
            return
        terminal.show_text("\n")
        self.messages = [*asked, {"role": "assistant", "content": answer}]

    def _tell_once(self, notes: tuple[str, ...]) -> None:
        new = [line for line in notes if line not in self._notes]
        self._notes.update(new)
        terminal.note(*(f"note: {line}" for line in new))
