"""``qwen3-moe experts``: which experts a text uses, as a PNG heatmap and as arrays."""

import argparse
import json
import sys
from pathlib import Path

from qwen3_moe_jax.commands.common import add_model_arguments, load_model
from qwen3_moe_jax.inspection.experts import ExpertUsage, expert_usage
from qwen3_moe_jax.parity.recorded import parity_text


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "text", nargs="?", help="the text; - reads standard input (default: some Python source)"
    )
    parser.add_argument("--file", metavar="FILE", help="read the text from a file")
    parser.add_argument(
        "-o", "--png", default="experts.png", metavar="FILE.png", help="where the picture goes"
    )
    parser.add_argument("--npz", metavar="FILE.npz", help="write counts and shares here")
    parser.add_argument("--json", action="store_true", help="counts as one JSON object")
    add_model_arguments(parser)


def run(args: argparse.Namespace) -> int:
    text = _text(args)
    with load_model(args) as model:
        usage = expert_usage(
            model.runner,
            model.tokenizer.encode(text),
            model=str(model.source.metadata.get("general.name", model.source.path.name)),
            text=text[:200],
        )
    usage.save_picture(args.png)
    if args.npz:
        usage.save_arrays(args.npz)
    if args.json:
        print(json.dumps(_json(usage, args)))
    else:
        show(usage)
        print(f"picture: {args.png}" + (f", arrays: {args.npz}" if args.npz else ""))
    return 0


def _text(args: argparse.Namespace) -> str:
    if args.file:
        return Path(args.file).read_text()
    if args.text == "-":
        return sys.stdin.read()
    return parity_text() if args.text is None else args.text


def _json(usage: ExpertUsage, args: argparse.Namespace) -> dict[str, object]:
    return {
        "tokens": usage.tokens,
        "experts_per_token": usage.experts_per_token,
        "counts": usage.counts.tolist(),
        "balance": usage.balance().tolist(),
        "unused": usage.unused().tolist(),
        "png": args.png,
        "npz": args.npz,
    }


def show(usage: ExpertUsage) -> None:
    """One line a layer: the most used experts, the balance, how many are unused."""
    print(f"{usage.tokens} tokens, {usage.experts_per_token} of {usage.counts.shape[1]} experts a token")
    balance, unused = usage.balance(), usage.unused()
    for layer, share in enumerate(usage.share):
        best = sorted(range(len(share)), key=lambda e: -share[e])[:5]
        most = ", ".join(f"{e} ({share[e]:.0%})" for e in best)
        print(f"layer {layer:>3}: most used {most}; balance {balance[layer]:.2f}, {unused[layer]} unused")
