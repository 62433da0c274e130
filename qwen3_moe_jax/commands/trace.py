"""``qwen3-moe trace``: norms, ranges and non-finite counts of every stage, and the experts of every token."""

import argparse

from qwen3_moe_jax.commands import options
from qwen3_moe_jax.commands.common import add_model_arguments, load_model
from qwen3_moe_jax.convert.open_model import open_model
from qwen3_moe_jax.core import terminal
from qwen3_moe_jax.core.counted import counted
from qwen3_moe_jax.core.errors import OptionError
from qwen3_moe_jax.core.exit_codes import ExitCode
from qwen3_moe_jax.core.stages import STAGES
from qwen3_moe_jax.inspection.trace import Trace, figures_json, trace
from qwen3_moe_jax.loader import model_path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "prompt", nargs="?", type=options.text, default="def fib(n):\n", help="the text to run"
    )
    parser.add_argument(
        "--stage", action="append", choices=tuple(STAGES), metavar="NAME", help="this stage only; repeatable"
    )
    parser.add_argument(
        "--layer",
        action="append",
        type=options.number(0),
        metavar="N",
        help="show this layer only; repeatable",
    )
    parser.add_argument(
        "--payload",
        type=options.output(),
        metavar="FILE.npz",
        help="write every array here, for numpy and bisect",
    )
    parser.add_argument("--json", action="store_true", help="figures and experts as one JSON object")
    add_model_arguments(parser)


def run(args: argparse.Namespace) -> int:
    _check_layers(args)
    with load_model(args, before_weights=lambda opened: opened.check(args.prompt)) as model:
        token_ids = model.tokenizer.encode(args.prompt)
        recorded = trace(model.runner, token_ids, args.stage or tuple(STAGES))
    if args.payload:
        recorded.save(args.payload)
    if args.json:
        terminal.show_json(_of_layers(figures_json(recorded), args.layer))
    else:
        show(recorded, args.layer)
        if args.payload:
            terminal.show(f"arrays: {args.payload}")
    return ExitCode.FAULT if any(f.nonfinite for f in recorded.figures()) else ExitCode.DONE


def _check_layers(args: argparse.Namespace) -> None:
    """Raises OptionError for a layer that the model does not have, before it is loaded."""
    if args.layer is None:
        return
    with open_model(model_path(args.model)) as source:
        count = source.config.num_hidden_layers
    if max(args.layer) >= count:
        raise OptionError(f"--layer {max(args.layer)}: this model has layers 0 to {count - 1}")


def _of_layers(data: dict, layers: list[int] | None) -> dict:
    """The part of the JSON that speaks of these layers, and of what is outside all layers."""
    if layers is None:
        return data
    kept = {row: [r for r in data[row] if r["layer"] in (None, *layers)] for row in ("stages", "experts")}
    return {**data, **kept}


def show(recorded: Trace, layers: list[int] | None) -> None:
    """One line for each stage, and under each layer's choice the experts of the last token."""
    terminal.show(f"{counted(len(recorded.token_ids), 'token')} on {recorded.facts['backend']}")
    head = f"{'stage':<24} {'shape':<16} {'min':>11} {'max':>11} {'mean':>11} {'norm':>11}  non-finite"
    terminal.show_styled((head, "bold"))
    experts = {row["layer"]: row for row in recorded.experts()}  # the last token's remain
    for figures in recorded.figures():
        if layers is not None and figures.layer not in (None, *layers):
            continue
        shape = "x".join(map(str, figures.shape))
        numbers = " ".join(f"{v:>11.4g}" for v in (figures.min, figures.max, figures.mean, figures.norm))
        bad = f"  {figures.nonfinite}" if figures.nonfinite else ""
        style = "bold red" if figures.nonfinite else None
        terminal.show_styled((f"{figures.where:<24} {shape:<16} {numbers}{bad}", style))
        if figures.stage == "ffn_moe_topk":
            choice = f"{'':<24} last token: {_choice(experts[figures.layer])}"
            terminal.show_styled((choice, "dim"))


def _choice(row: dict) -> str:
    if "weights" not in row:
        return ", ".join(map(str, row["experts"]))
    return ", ".join(f"{e} ({w:.2f})" for e, w in zip(row["experts"], row["weights"], strict=True))
