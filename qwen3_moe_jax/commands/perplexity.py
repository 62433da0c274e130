"""``qwen3-moe perplexity``: how well the model expects a text."""

import argparse
import json
import sys
import time
from pathlib import Path

from qwen3_moe_jax.commands.common import SLOW_SECONDS, add_model_arguments, explain_if_slow, load_model
from qwen3_moe_jax.measure.perplexity import DEFAULT_CONTEXT, Perplexity, check_windows, estimates

EPILOG = """\
Without --stride the definition is llama-perplexity's: windows of --context tokens beside each other, of
which the second half is scored; the end of the text that fills no window is left out. With --stride it is
Hugging Face's: windows begin every STRIDE tokens and each scores what no window before it has seen, so every
token but the first counts once. Figures of one text compare only at the same definition and --context.
"""

LINE_SECONDS = {True: 0.2, False: 5.0}
"""Between two reports of progress, on a terminal and elsewhere."""

COMPILING = "scoring the first window (the first run on a machine also compiles; the programs are kept)"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = EPILOG
    parser.add_argument("file", metavar="FILE", help="a text in UTF-8; - reads standard input")
    parser.add_argument(
        "--stride", type=int, metavar="TOKENS", help="score every token, in windows this far apart"
    )
    parser.add_argument("--json", action="store_true", help="one JSON object in place of the text")
    add_model_arguments(parser, context_help=f"tokens of a window (default: {DEFAULT_CONTEXT})")


def run(args: argparse.Namespace) -> int:
    args.context = DEFAULT_CONTEXT if args.context is None else args.context
    check_windows(args.context, args.stride)
    text = read_text(args.file)
    check_length(args.file, text, args.context if args.stride is None else 2)
    last, interrupted = None, False
    with load_model(args) as model:
        facts = {
            "model": str(model.source.path),
            "identity": model.source.identity,
            "backend": model.runner.describe(),
        }
        progress = _Progress(quiet=args.quiet)
        try:
            with explain_if_slow(COMPILING, quiet=args.quiet) as has_begun:
                for last in estimates(
                    model.runner, model.tokenizer, text, context=args.context, stride=args.stride
                ):
                    has_begun()
                    progress.show(last)
        except KeyboardInterrupt:
            interrupted = True
        progress.clear()
    if last is None:
        print("\nqwen3-moe: interrupted before the first window was scored", file=sys.stderr)
        return 130
    if args.json:
        print(json.dumps({**last.as_dict(), **facts}))
    else:
        _print(last, quiet=args.quiet)
    return 130 if interrupted else 0


def read_text(path: str) -> str:
    """The text of a file, or of standard input for "-"; line ends stay as they are.

    Raises:
      ValueError: it is empty or not UTF-8.
      OSError: it cannot be read.
    """
    name = _name(path)
    try:
        data = sys.stdin.buffer.read() if path == "-" else Path(path).read_bytes()
    except OSError as error:
        raise OSError(f"{name} cannot be read: {error.strerror}") from error
    if not data:
        raise ValueError(f"{name} is empty: perplexity needs a text")
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{name} is not a text in UTF-8: byte {data[error.start]:#04x} at offset {error.start}"
        ) from error


def check_length(path: str, text: str, least: int) -> None:
    """Raises ValueError for a text that cannot have ``least`` tokens, before a model is loaded for it."""
    nbytes = len(text.encode())
    if nbytes < least:
        raise ValueError(
            f"{_name(path)} has {nbytes} bytes, too few for {least} tokens: "
            "take a longer text or a smaller --context"
        )


def _name(path: str) -> str:
    return "standard input" if path == "-" else path


class _Progress:
    """The estimate so far and the time left, on standard error, once it takes long."""

    def __init__(self, *, quiet: bool):
        self._quiet = quiet
        self._on_terminal = sys.stderr.isatty()
        self._began = self._last = time.monotonic()
        self._shown = False

    def show(self, now: Perplexity) -> None:
        moment = time.monotonic()
        since = moment - (self._last if self._shown else self._began)
        due = LINE_SECONDS[self._on_terminal] if self._shown else SLOW_SECONDS
        if self._quiet or now.is_complete or since < due:
            return
        self._last, self._shown = moment, True
        line = (
            f"window {now.windows} of {now.windows_in_all}: perplexity {now.perplexity:.4f} so far, "
            f"{now.seconds_left:.0f} s left"
        )
        start, end = ("\r\x1b[K", "") if self._on_terminal else ("", "\n")
        print(f"{start}{line}", end=end, file=sys.stderr, flush=True)

    def clear(self) -> None:
        if self._shown and self._on_terminal:
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)


def _print(found: Perplexity, *, quiet: bool) -> None:
    whole = (
        "" if found.is_complete else f" (interrupted after {found.windows} of {found.windows_in_all} windows)"
    )
    print(f"perplexity {found.perplexity:.4f} +- {found.standard_error:.4f}{whole}")
    if quiet:
        return
    if found.stride is None:
        how = f"the second half of {found.windows} windows of {found.context}, as llama-perplexity does"
    else:
        how = f"{found.windows} windows of up to {found.context}, {found.stride} apart, each token once"
    print(
        f"{found.bits_per_byte:.4f} bits per byte\n"
        f"{found.tokens_scored} of {found.text_tokens} tokens scored: {how}\n"
        f"{found.seconds:.1f} s, {found.tokens_per_s:.1f} tokens/s through the model"
    )
