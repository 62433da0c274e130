"""``qwen3-moe perplexity``: how well the model expects a text."""

import argparse
import os
import time
from functools import partial

from qwen3_moe_jax import loader
from qwen3_moe_jax.commands import options
from qwen3_moe_jax.commands.against import run_against
from qwen3_moe_jax.commands.common import (
    add_model_arguments,
    add_picture,
    load_model,
    picture_path,
    what_is_slow,
)
from qwen3_moe_jax.core import terminal
from qwen3_moe_jax.core.counted import counted
from qwen3_moe_jax.core.errors import OptionError
from qwen3_moe_jax.core.exit_codes import ExitCode
from qwen3_moe_jax.core.pictures import drawn
from qwen3_moe_jax.core.terminal import SLOW_SECONDS, explain_if_slow, input_name
from qwen3_moe_jax.measure.divergence import Divergence
from qwen3_moe_jax.measure.perplexity import DEFAULT_CONTEXT, Perplexity, check_windows, cut_text, estimates
from qwen3_moe_jax.measure.plots import draw_perplexity
from qwen3_moe_jax.measure.positions import Positions
from qwen3_moe_jax.text.prompts import Opened
from qwen3_moe_jax.text.tokenizer import Tokenizer

EPILOG = """\
Without --stride the definition is llama-perplexity's: windows of --context tokens beside each other, of
which the second half is scored; the end of the text that fills no window is left out. With --stride it is
Hugging Face's: windows begin every STRIDE tokens and each scores what no window before it has seen, so every
token but the first counts once. Figures of one text compare only at the same definition and --context.
A text without one window of the default is scored in one window as with --stride, and a note says so.
--against compares the distributions of two files of one model, such as a quantized one with its original.
"""

LINE_SECONDS = {True: 0.2, False: 5.0}
"""Between two reports of progress, on a terminal and elsewhere."""


MAX_CHARACTERS = 256
"""Of a token, far above those of any vocabulary: a text of more is not short."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = EPILOG
    parser.add_argument(
        "file", metavar="FILE", type=options.path, help="a text in UTF-8; - reads standard input"
    )
    parser.add_argument(
        "--stride",
        type=options.number(1),
        metavar="TOKENS",
        help="score every token, in windows this far apart",
    )
    parser.add_argument(
        "--against",
        type=options.path,
        metavar="MODEL",
        help="the KL divergence from another file of this model, and how often the likeliest token agrees",
    )
    add_picture(parser, "perplexity by position in the window, and along the text")
    parser.add_argument("--json", action="store_true", help="one JSON object in place of the text")
    add_model_arguments(parser, context_help=f"tokens of a window (default: {DEFAULT_CONTEXT})")


def run(args: argparse.Namespace) -> int:
    picture_path(args)
    if args.against and args.picture:
        raise OptionError("--picture shows one model: leave out --against")
    may_be_short = args.context is None and args.stride is None and not args.against
    args.context = DEFAULT_CONTEXT if args.context is None else args.context
    try:
        check_windows(args.context, args.stride)
    except ValueError as error:
        raise OptionError(str(error)) from error
    text = terminal.read_text(args.file)
    if not text:
        raise ValueError(f"{input_name(args.file)} is empty: perplexity needs a text")
    check_length(args.file, text, 2 if may_be_short or args.stride is not None else args.context)
    if args.against:
        args.against = loader.model_path(args.against, quiet=args.quiet)
        return run_against(args, text, _Progress(quiet=args.quiet))
    last, interrupted = None, False
    positions = Positions.empty(args.context)
    check = partial(_check, args, text, may_be_short=may_be_short)
    with load_model(args, before_weights=check) as model:
        facts = {
            "model": str(model.source.path),
            "identity": model.source.identity,
            "backend": model.runner.describe(),
        }
        if may_be_short:
            args.stride = _stride_of_short(model.tokenizer, text, quiet=args.quiet)
        progress = _Progress(quiet=args.quiet)
        try:
            slow = what_is_slow(model.runner, "scoring the first window")
            with explain_if_slow(slow, quiet=args.quiet) as has_begun:
                for last in estimates(
                    model.runner,
                    model.tokenizer,
                    text,
                    context=args.context,
                    stride=args.stride,
                    positions=positions,
                ):
                    has_begun()
                    progress.show(last)
        except KeyboardInterrupt:
            interrupted = True
        progress.clear()
    if last is None:
        terminal.error("interrupted before the first window was scored")
        return ExitCode.INTERRUPTED
    if args.picture:
        title = f"{input_name(args.file)} by {os.path.basename(facts['model'])}"
        drawn(args.picture, lambda: draw_perplexity(last, positions, title=title))
        facts["picture"] = args.picture
    if args.json:
        terminal.show_json({**last.as_dict(), **facts})
    else:
        _print(last, quiet=args.quiet)
        terminal.show(*([f"picture: {args.picture}"] if args.picture else []))
    return ExitCode.INTERRUPTED if interrupted else ExitCode.DONE


def check_length(path: str, text: str, minimum: int) -> None:
    """Raises ValueError for a text that cannot have ``minimum`` tokens, before a model is loaded for it."""
    nbytes = len(text.encode())
    if nbytes < minimum:
        raise ValueError(
            f"{input_name(path)} has {nbytes} bytes, too few for {minimum} tokens: "
            "take a longer text or a smaller --context"
        )


def _check(args: argparse.Namespace, text: str, opened: Opened, *, may_be_short: bool) -> None:
    """Refuses a text with too few tokens for a window; one that surely has enough is not counted here."""
    stride = args.context if may_be_short else args.stride
    minimum = args.context if stride is None else 2
    if len(text) <= minimum * MAX_CHARACTERS:
        cut_text(opened.max_context, opened.tokenizer, text, args.context, stride)


def _stride_of_short(tokenizer: Tokenizer, text: str, *, quiet: bool) -> int | None:
    """The stride for a text that has not one window of the default: each token is scored once, as lm-eval
    does whatever the length; None for longer ones."""
    if len(text) > DEFAULT_CONTEXT * MAX_CHARACTERS:
        return None
    if (count := len(tokenizer.encode(text))) >= DEFAULT_CONTEXT:
        return None
    if not quiet:
        terminal.note(
            f"note: the text has {count} tokens and a window {DEFAULT_CONTEXT}: each token is scored once, "
            "after all before it; llama-perplexity's figure needs a longer text, or a smaller --context"
        )
    return DEFAULT_CONTEXT


class _Progress:
    """The estimate so far and the time left, on standard error, once it takes long."""

    def __init__(self, *, quiet: bool):
        self._quiet = quiet
        self._status = terminal.Status()
        self._began = self._last = time.monotonic()
        self._shown = False

    def show(self, now: Perplexity | Divergence) -> None:
        moment = time.monotonic()
        since = moment - (self._last if self._shown else self._began)
        due = LINE_SECONDS[terminal.notes_on_terminal()] if self._shown else SLOW_SECONDS
        if self._quiet or now.is_complete or since < due:
            return
        self._last, self._shown = moment, True
        self._status.show(
            f"window {now.windows} of {now.windows_in_all}: {_in_short(now)} so far, "
            f"{now.seconds_left:.0f} s left"
        )

    def clear(self) -> None:
        self._status.clear()


def _in_short(now: Perplexity | Divergence) -> str:
    return f"KL {now.kl:.6f}" if isinstance(now, Divergence) else f"perplexity {now.perplexity:.4f}"


def _print(found: Perplexity, *, quiet: bool) -> None:
    whole = (
        "" if found.is_complete else f" (interrupted after {found.windows} of {found.windows_in_all} windows)"
    )
    terminal.show(f"perplexity {found.perplexity:.4f} +- {found.standard_error:.4f}{whole}")
    if quiet:
        return
    windows = counted(found.windows, "window")
    if found.stride is None:
        how = f"the second half of {windows} of {found.context}, as llama-perplexity does"
    else:
        how = f"{windows} of up to {found.context}, {found.stride} apart, each token once"
    terminal.show(
        f"{found.bits_per_byte:.4f} bits per byte",
        f"{found.tokens_scored} of {found.text_tokens} tokens scored: {how}",
        f"{found.seconds:.1f} s, {found.tokens_per_s:.1f} tokens/s through the model",
    )
