"""``qwen3-moe bisect``: the first stage at which a backend, or a recorded trace, is wrong."""

import argparse
import os

from qwen3_moe_jax import loader
from qwen3_moe_jax.commands import options
from qwen3_moe_jax.commands.common import (
    add_adapter,
    add_kernels,
    add_mesh,
    add_model,
    dtype_of,
    runner_options,
)
from qwen3_moe_jax.convert.open_model import open_model
from qwen3_moe_jax.convert.source import ModelSource
from qwen3_moe_jax.core import terminal
from qwen3_moe_jax.core.errors import OptionError
from qwen3_moe_jax.core.exit_codes import ExitCode
from qwen3_moe_jax.core.runner import Runner
from qwen3_moe_jax.inspection.trace import Trace, trace
from qwen3_moe_jax.parity.bisect import Comparison, Departure, bisect, bisect_trace, compare
from qwen3_moe_jax.parity.recorded import parity_text
from qwen3_moe_jax.text.tokenizer import Tokenizer

REFERENCE = "reference"
TARGETS = (REFERENCE, "jax", "jax:bfloat16", "wgpu", "wgpu:float32")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "suspect",
        nargs="?",
        type=options.path,
        default="jax",
        metavar="SUSPECT",
        help=f"{', '.join(TARGETS)}, or a trace that `trace --payload` wrote (default: jax)",
    )
    parser.add_argument(
        "--against",
        type=options.path,
        metavar="OTHER",
        help="also run this backend, or read this trace, and show where the two part",
    )
    add_model(parser)
    parser.add_argument(
        "-p", "--prompt", type=options.text, help="the text to run (default: the text that verify uses)"
    )
    add_kernels(parser)
    add_mesh(parser)
    add_adapter(parser)
    parser.add_argument("--json", action="store_true", help="one JSON object")


def run(args: argparse.Namespace) -> int:
    sides = [args.suspect] + ([args.against] if args.against else [])
    traces = {side: _recorded(side) for side in sides}
    with open_model(loader.model_path(args.model)) as source:
        tokenizer = Tokenizer(source.metadata, vocab_size=source.config.vocab_size)
        token_ids = tokenizer.encode(parity_text() if args.prompt is None else args.prompt)
        found = {
            side: bisect(source, _runner(source, side, args), token_ids)
            if recorded is None
            else bisect_trace(source, recorded)
            for side, recorded in traces.items()
        }
        parting = _parting(source, sides, traces, token_ids, args) if args.against else None
    if args.json:
        data = {side: None if d is None else d.to_json() for side, d in found.items()}
        terminal.show_json({"departures": data, "parting": parting})
    else:
        _show(found, parting)
    return ExitCode.FAULT if any(found.values()) else ExitCode.DONE


def _recorded(side: str) -> Trace | None:
    """The trace that ``side`` names, or None for a backend."""
    if side in TARGETS:
        return None
    if not os.path.isfile(side):  # False, too, for a name that no file can have
        raise OptionError(f"{side!r} is no backend ({', '.join(TARGETS)}) and no file")
    return Trace.load(side)


def _runner(source: ModelSource, side: str, args: argparse.Namespace) -> Runner:
    backend = side.partition(":")[0]
    context = min(1024, source.config.max_position_embeddings)
    options = runner_options(backend, args)
    return loader.make_runner(source, backend, max_context=context, dtype=dtype_of(side), **options)


def _parting(
    source: ModelSource,
    sides: list[str],
    recorded: dict[str, Trace | None],
    token_ids: list[int],
    args: argparse.Namespace,
) -> list[dict[str, object]]:
    """How far two sides are apart at every stage, with the first one's experts replayed."""
    traces = [recorded[side] for side in sides]
    known = next((t for t in traces if t is not None), None)
    ids = token_ids[:40] if known is None else known.token_ids
    first = traces[0] or trace(_runner(source, sides[0], args), ids)
    other = traces[1] or trace(_runner(source, sides[1], args), ids, expert_ids=first.forward.expert_ids)
    return [_row(c) for c in compare(first, other)]


def _row(comparison: Comparison) -> dict[str, object]:
    finite = comparison.nmse < float("inf")
    return {
        "name": comparison.name,
        "nmse": comparison.nmse if finite else None,
        "cosine": comparison.cosine,
    }


def _show(found: dict[str, Departure | None], parting: list[dict[str, object]] | None) -> None:
    for side, departure in found.items():
        words = ["no stage departs from the reference"]
        if departure is not None:
            words = departure.in_words().splitlines()
        terminal.show(f"{side}: {words[0]}", *words[1:])
    if parting:
        terminal.show(
            "", "how far the two are apart, errors of the stages before included (experts replayed):"
        )
        for row in parting:
            nmse = "not finite" if row["nmse"] is None else f"{row['nmse']:.1e}"
            terminal.show(f"  {row['name']:<24} NMSE {nmse:<10} minimum cosine {row['cosine']:.9f}")
