"""``qwen3-moe generate``: text after a prompt, streamed to standard output."""

import argparse
import json
import sys
import time

from qwen3_moe_jax.commands.common import (
    add_model_arguments,
    add_sampling_arguments,
    explain_if_slow,
    load_model,
    sampling_from,
)

DEFAULT_MAX_TOKENS = 256

COMPILING = "reading the prompt (the first run on a machine also compiles; the programs are kept)"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("prompt", help="the text to go on from; - reads standard input")
    parser.add_argument("--chat", action="store_true", help="send the prompt as a user's message")
    parser.add_argument("--json", action="store_true", help="one JSON object in place of the text")
    add_sampling_arguments(parser)
    add_model_arguments(parser)


def run(args: argparse.Namespace) -> int:
    prompt = sys.stdin.read() if args.prompt == "-" else args.prompt
    with load_model(args) as model:
        sampling = sampling_from(args, model)
        if args.chat:
            prompt = [{"role": "user", "content": prompt}]
        began = time.perf_counter()
        stream = model.open_stream(
            prompt, max_tokens=args.max_tokens or DEFAULT_MAX_TOKENS, sampling=sampling, stop=args.stop
        )
        pieces, first = [], None
        try:
            with explain_if_slow(COMPILING, quiet=args.quiet) as has_begun:
                for piece in stream:
                    has_begun()
                    first = first or time.perf_counter()
                    pieces.append(piece)
                    if not args.json:
                        print(piece, end="", flush=True)
        except KeyboardInterrupt:
            if not args.json:
                print(flush=True)
            return 130
        finished = time.perf_counter()
    figures = _figures(stream, began, first or finished, finished)
    if args.json:
        print(json.dumps({"text": "".join(pieces), "finish_reason": stream.finish_reason, **figures}))
        return 0
    print()
    if not args.quiet:
        print(
            f"{figures['prompt_tokens']} prompt tokens, first text after {figures['first_text_s']:.2f} s; "
            f"{figures['new_tokens']} new tokens, {figures['tokens_per_s']:.1f} tokens/s; "
            f"ended by {stream.finish_reason}",
            file=sys.stderr,
        )
    return 0


def _figures(stream, began: float, first: float, finished: float) -> dict[str, float]:
    rate = (stream.new_tokens - 1) / (finished - first) if finished > first else 0.0
    return {
        "prompt_tokens": stream.prompt_tokens,
        "new_tokens": stream.new_tokens,
        "first_text_s": first - began,
        "tokens_per_s": max(rate, 0.0),
    }
