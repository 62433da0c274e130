"""``qwen3-moe experts``: which experts a text uses, as a picture and as arrays."""

import argparse

from qwen3_moe_jax.commands import options
from qwen3_moe_jax.commands.common import add_model_arguments, load_model
from qwen3_moe_jax.core import terminal
from qwen3_moe_jax.core.errors import OptionError
from qwen3_moe_jax.core.exit_codes import ExitCode
from qwen3_moe_jax.core.output_file import check_output
from qwen3_moe_jax.inspection.experts import PICTURES, ExpertUsage, expert_usage
from qwen3_moe_jax.parity.recorded import parity_text

DEFAULT_PICTURE = "experts.png"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "text",
        nargs="?",
        type=options.text,
        help="the text; - reads standard input (default: some Python source)",
    )
    parser.add_argument("-f", "--file", type=options.path, metavar="FILE", help="read the text from a file")
    parser.add_argument(
        "-o",
        "--picture",
        type=options.output(*PICTURES),
        metavar="FILE",
        help=f"where the picture goes: {', '.join(PICTURES)} (default: {DEFAULT_PICTURE}; none with --json)",
    )
    parser.add_argument(
        "--npz", type=options.output(), metavar="FILE.npz", help="write counts and shares here"
    )
    parser.add_argument("--json", action="store_true", help="counts as one JSON object")
    add_model_arguments(parser)


def run(args: argparse.Namespace) -> int:
    text = _text(args)
    if args.picture is None and not args.json:
        args.picture = check_output(DEFAULT_PICTURE)
    with load_model(args) as model:
        usage = expert_usage(
            model.runner,
            model.tokenizer.encode(text),
            model=str(model.source.metadata.get("general.name", model.source.path.name)),
            text=text[:200],
        )
    if args.picture:
        usage.save_picture(args.picture)
    if args.npz:
        usage.save_arrays(args.npz)
    if args.json:
        terminal.show_json(_json(usage, args))
    else:
        show(usage)
        terminal.show(f"picture: {args.picture}" + (f", arrays: {args.npz}" if args.npz else ""))
    return ExitCode.DONE


def _text(args: argparse.Namespace) -> str:
    """The text that is asked for; raises OptionError if it is empty or named twice."""
    if args.file and args.text:
        raise OptionError("a text and --file are given: give one")
    source = args.file or ("-" if args.text == "-" else None)
    if source is None:
        return parity_text() if args.text is None else args.text
    text = terminal.read_text(source)
    if not text:
        raise OptionError(f"{terminal.input_name(source)} is empty: give at least one character")
    return text


def _json(usage: ExpertUsage, args: argparse.Namespace) -> dict[str, object]:
    return {
        "tokens": usage.tokens,
        "experts_per_token": usage.experts_per_token,
        "counts": usage.counts.tolist(),
        "balance": usage.balance().tolist(),
        "unused": usage.unused().tolist(),
        "picture": args.picture,
        "npz": args.npz,
    }


def show(usage: ExpertUsage) -> None:
    """One line for each layer: the most used experts, the balance, how many are unused."""
    experts = f"{usage.experts_per_token} of {usage.counts.shape[1]} experts per token"
    terminal.show(f"{usage.tokens} tokens, {experts}")
    balance, unused = usage.balance(), usage.unused()
    for layer, share in enumerate(usage.share):
        best = sorted(range(len(share)), key=lambda e: -share[e])[:5]
        most = ", ".join(f"{e} ({share[e]:.0%})" for e in best)
        terminal.show(
            f"layer {layer:>3}: most used {most}; balance {balance[layer]:.2f}, {unused[layer]} unused"
        )
