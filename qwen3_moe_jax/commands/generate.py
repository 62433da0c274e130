"""``qwen3-moe generate``: text after a prompt, streamed to standard output."""

import argparse
import math
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

from qwen3_moe_jax.commands import options
from qwen3_moe_jax.commands.common import (
    add_model_arguments,
    add_processes,
    add_prompt_lookup,
    add_sampling_arguments,
    add_template,
    compile_seconds,
    load_model,
    sampling_from,
    what_is_slow,
)
from qwen3_moe_jax.core import interrupts, terminal
from qwen3_moe_jax.core.counted import counted
from qwen3_moe_jax.core.errors import OptionError
from qwen3_moe_jax.core.exit_codes import ExitCode
from qwen3_moe_jax.core.lookup import Drafts
from qwen3_moe_jax.core.runner import Runner
from qwen3_moe_jax.machine import processes
from qwen3_moe_jax.text.chat_template import start_renderer
from qwen3_moe_jax.text.stream import TextStream

if TYPE_CHECKING:
    from qwen3_moe_jax.api import Model
    from qwen3_moe_jax.text.prompts import Opened

T = TypeVar("T")

DEFAULT_MAX_TOKENS = 256

AUTO = "auto"

THINKING = {"on": True, "off": False, AUTO: None}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "prompt", nargs="?", type=options.text, help="the text to go on from; - reads standard input"
    )
    parser.add_argument("-p", "--prompt", dest="prompt_option", type=options.text, help="the same")
    parser.add_argument("-f", "--file", type=options.path, metavar="FILE", help="read the prompt from a file")
    parser.add_argument("--chat", action="store_true", help="send the prompt as a user's message")
    parser.add_argument("--system", type=options.text, metavar="TEXT", help="a system message (with --chat)")
    add_thinking(parser)
    parser.add_argument(
        "--tools", type=options.tools, metavar="FILE", help="JSON with functions to call (with --chat)"
    )
    add_template(parser)
    parser.add_argument(
        "--prefill", type=options.text, metavar="TEXT", help="how the answer begins; it is not written again"
    )
    parser.add_argument(
        "--special", action="store_true", help="<|fim_prefix|> and other control tokens of the prompt count"
    )
    parser.add_argument("--json", action="store_true", help="one JSON object in place of the text")
    parser.add_argument(
        "--logprobs",
        action="store_true",
        help="with --json: ln of each token's probability, before temperature and penalties",
    )
    add_prompt_lookup(parser)
    add_sampling_arguments(parser)
    add_model_arguments(parser)
    add_processes(parser)


def add_thinking(parser: argparse.ArgumentParser) -> None:
    """--thinking."""
    parser.add_argument(
        "--thinking", choices=tuple(THINKING), default="auto", help="the chat template's thinking switch"
    )


def run(args: argparse.Namespace) -> int:
    # one process alone has the standard input
    given = prompt_from(args) if processes.is_first() else None
    prompt, thinking = processes.of_first("prompt", given), THINKING[args.thinking]
    asked = {"thinking": thinking, "tools": args.tools, "prefill": args.prefill or ""}

    def check(opened: "Opened") -> None:
        opened.check(prompt, special=args.special, template=args.chat_template, **asked)

    with load_model(args, first_prompt=tokens_of(prompt), before_weights=check) as model:
        model.chat_template = args.chat_template
        sampling = sampling_from(args, model, thinking=thinking)
        clock = Clock(model.runner)
        stream = model.open_stream(
            prompt,
            max_tokens=args.max_tokens or DEFAULT_MAX_TOKENS,
            sampling=sampling,
            stop=args.stop,
            special=args.special,
            **asked,
        )
        terminal.note(*(f"note: {line}" for line in stream.notes))
        pieces: list[str] = []
        show = pieces.append if args.json else _all_of(pieces.append, terminal.show_text)
        is_stopped = written(stream, stream, clock, show, quiet=args.quiet)
        ids = model.prompt(prompt, special=args.special, **asked)[0] if args.json else []
        facts: dict[str, object] = {"prompt_token_ids": ids, "token_ids": stream.tokens}
        if args.logprobs:
            facts["logprobs"] = _logprobs(model, ids, stream.tokens)
    figures = clock.figures(stream)
    if args.json:
        reason = "interrupted" if is_stopped else stream.finish_reason
        text = {"text": "".join(pieces), "finish_reason": reason, "seed": stream.seed, "notes": stream.notes}
        terminal.show_json({**text, **figures.as_dict(), **facts})
    else:
        terminal.show_text("\n")
        if not args.quiet:
            terminal.note(figures.in_words("Ctrl-C" if is_stopped else str(stream.finish_reason)))
    return ExitCode.INTERRUPTED if is_stopped else ExitCode.DONE


BYTES_PER_TOKEN, TOKENS_PER_MESSAGE = 4, 8


def tokens_of(prompt: str | list[dict[str, str]]) -> int:
    """About how many tokens a prompt has, before there is a tokenizer."""
    texts = [prompt] if isinstance(prompt, str) else [message["content"] for message in prompt]
    around = 0 if isinstance(prompt, str) else TOKENS_PER_MESSAGE * (len(texts) + 1)
    return sum(len(text.encode()) // BYTES_PER_TOKEN + 1 for text in texts) + around


def _all_of(*takers: Callable[[str], None]) -> Callable[[str], None]:
    def take(text: str) -> None:
        for taker in takers:
            taker(text)

    return take


def _logprobs(model: "Model", prompt: list[int], tokens: list[int]) -> list[float | None]:
    """Of each new token, by one more pass over the text; None (JSON's null) where it is not finite."""
    if not tokens:
        return []
    found = model.runner.log_likelihoods([*prompt, *tokens], first=len(prompt))
    return [float(value) if math.isfinite(value) else None for value in found]


def prompt_from(args: argparse.Namespace) -> str | list[dict[str, str]]:
    """The text, or with --chat the messages, that the command line asks for.

    Raises:
      OptionError: there is no prompt, more than one, an empty one, or one option needs another.
    """
    given = [p for p in (args.prompt, args.prompt_option, args.file) if p is not None]
    if len(given) != 1:
        raise OptionError(f"{len(given)} prompts are given: give one, as PROMPT, --prompt or --file")
    if not args.chat and (args.system or args.thinking != "auto"):
        raise OptionError("--system and --thinking are for messages: add --chat")
    if not args.chat and (args.tools or args.chat_template):
        raise OptionError("--tools and --chat-template-file are for messages: add --chat")
    if args.chat and args.special:
        raise OptionError(
            "--special is for plain prompts, in a message control tokens stay text: leave it out"
        )
    if args.logprobs and not args.json:
        raise OptionError("--logprobs are part of --json: add it")
    source: str | None = args.file or ("-" if given == ["-"] else None)
    prompt = given[0] if source is None else terminal.read_text(source)
    if not prompt:
        where = "" if source is None else f"{terminal.input_name(source)} is empty: "
        raise OptionError(f"{where}the prompt is empty: give at least one character")
    if not args.chat:
        return prompt
    start_renderer()  # it is up by the time that the model is
    system = [{"role": "system", "content": args.system}] if args.system else []
    return [*system, {"role": "user", "content": prompt}]


def written(
    pieces: Iterable[T], stream: TextStream, clock: "Clock", show: Callable[[T], None], *, quiet: bool
) -> bool:
    """Shows an answer's pieces as they come; whether Ctrl-C ended it. ``pieces`` come from ``stream``."""
    slow = what_is_slow(clock.runner, "reading the prompt")
    clock.follow(stream)
    try:
        with interrupts.as_flag() as is_stopped, terminal.explain_if_slow(slow, quiet=quiet) as has_begun:
            for piece in pieces:
                has_begun()
                clock.text()
                show(piece)
                if is_stopped():
                    break
        stopped = is_stopped()
    except KeyboardInterrupt:
        stopped = True
    stream.close()
    clock.stop()
    return stopped and stream.finish_reason is None


@dataclass(frozen=True)
class Figures:
    """What one generation took.

    Attributes:
      prompt_tokens, new_tokens: how many.
      first_text_s: seconds from the request to the first text, compilation included.
      compile_s: seconds of compilation, which no rate counts.
      prompt_tokens_per_s, tokens_per_s: rates of reading and of writing; None without enough tokens.
      reused_tokens: tokens of the prompt that were in the cache already; no rate counts them.
      drafts: of prompt lookup, or None without it.
    """

    prompt_tokens: int
    new_tokens: int
    first_text_s: float
    compile_s: float
    prompt_tokens_per_s: float | None
    tokens_per_s: float | None
    reused_tokens: int = 0
    drafts: Drafts | None = None

    def as_dict(self) -> dict[str, object]:
        """Plain data."""
        return {**vars(self), "drafts": self.drafts and vars(self.drafts)}

    def in_words(self, ended_by: str) -> str:
        """One line."""
        reused = f" ({self.reused_tokens} in the cache)" if self.reused_tokens else ""
        parts = [
            f"{counted(self.prompt_tokens, 'prompt token')}{reused}{_rate(self.prompt_tokens_per_s)}",
            f"first text after {self.first_text_s:.2f} s",
            f"{counted(self.new_tokens, 'new token')}{_rate(self.tokens_per_s)}",
        ]
        if self.drafts is not None:
            parts.append(self.drafts.in_words())
        if self.compile_s >= 0.05:
            parts.append(f"compiled {self.compile_s:.1f} s (in no rate)")
        return "; ".join([*parts, f"ended by {ended_by}"])


def _rate(rate: float | None) -> str:
    return "" if rate is None else f", {rate:,.1f} tokens/s" if rate < 100 else f", {rate:,.0f} tokens/s"


class Clock:
    """Times one generation, with the time of compilation apart."""

    def __init__(self, runner: Runner):
        self.runner = runner
        self._began = self._now()
        self._first_token: tuple[float, float] | None = None
        self._first_text: tuple[float, float] | None = None
        self._end: tuple[float, float] | None = None

    def _now(self) -> tuple[float, float]:
        return time.perf_counter(), compile_seconds(self.runner)

    def follow(self, stream: TextStream) -> None:
        """Listens for the stream's first token."""
        stream.on_first_token = self.token

    def token(self) -> None:
        """The first token has come: the prompt has been read."""
        self._first_token = self._now()

    def text(self) -> None:
        """A piece of text has come."""
        if self._first_text is None:
            self._first_text = self._now()

    def stop(self) -> None:
        """The generation has ended."""
        self._end = self._now()

    def figures(self, stream: TextStream) -> Figures:
        """The figures; without any token all time is that of reading."""
        began, end = self._began, self._end or self._now()
        first, text = self._first_token or end, self._first_text or end
        reused = self.runner.reused_tokens
        return Figures(
            stream.prompt_tokens,
            stream.new_tokens,
            text[0] - began[0],
            end[1] - began[1],
            _per_second(stream.prompt_tokens - reused, began, first),
            _per_second(stream.new_tokens - 1, first, end),
            reused,
            stream.drafts,
        )


def _per_second(tokens: int, start: tuple[float, float], end: tuple[float, float]) -> float | None:
    """Tokens per second of what was no compilation."""
    seconds = (end[0] - start[0]) - (end[1] - start[1])
    return tokens / seconds if tokens > 0 and seconds > 0 else None
