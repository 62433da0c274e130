"""``qwen3-moe chat``: a conversation in the terminal."""

import argparse
import sys

from qwen3_moe_jax.commands.common import (
    add_model_arguments,
    add_sampling_arguments,
    explain_if_slow,
    load_model,
    sampling_from,
)
from qwen3_moe_jax.text.chat_template import start_renderer

HELP = "/reset forgets the conversation, /exit or Ctrl-D ends, Ctrl-C stops an answer"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--system", metavar="TEXT", help="a system message")
    parser.add_argument(
        "--thinking", choices=("on", "off", "auto"), default="auto", help="the template's thinking switch"
    )
    add_sampling_arguments(parser)
    add_model_arguments(parser)


def run(args: argparse.Namespace) -> int:
    thinking = {"on": True, "off": False, "auto": None}[args.thinking]
    start_renderer()  # it is up by the time that the model is
    with load_model(args) as model:
        sampling = sampling_from(args, model, thinking=thinking)
        start = [{"role": "system", "content": args.system}] if args.system else []
        messages = list(start)
        print(HELP, file=sys.stderr)
        while (text := _ask()) is not None:
            if not text.strip():
                continue
            if text.strip() == "/exit":
                break
            if text.strip() == "/reset":
                messages = list(start)
                continue
            messages.append({"role": "user", "content": text})
            answer = _answer(model, messages, args, sampling, thinking)
            if answer is None:
                messages.pop()
            else:
                messages.append({"role": "assistant", "content": answer})
    return 0


def _ask() -> str | None:
    """A line from the user; None at the end of input."""
    try:
        return input("> " if sys.stdin.isatty() else "")
    except EOFError:
        return None


def _answer(model, messages, args, sampling, thinking) -> str | None:
    """Streams one answer; None if it could not be given. Ctrl-C keeps what was written."""
    pieces: list[str] = []
    try:
        stream = model.open_stream(
            messages, max_tokens=args.max_tokens, sampling=sampling, stop=args.stop, thinking=thinking
        )
        with explain_if_slow("reading the conversation ...", quiet=args.quiet) as has_begun:
            for piece in stream:
                has_begun()
                pieces.append(piece)
                print(piece, end="", flush=True)
    except KeyboardInterrupt:
        pass
    except (ValueError, ArithmeticError) as error:
        print(f"qwen3-moe: {error}", file=sys.stderr)
        return None
    print()
    return "".join(pieces)
