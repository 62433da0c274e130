"""``qwen3-moe experts``: which experts a text uses, as a picture and as arrays."""

import argparse

import numpy as np

from qwen3_moe_jax.commands import options
from qwen3_moe_jax.commands.common import add_model_arguments, load_model, picture_path
from qwen3_moe_jax.core import terminal
from qwen3_moe_jax.core.counted import counted
from qwen3_moe_jax.core.errors import OptionError
from qwen3_moe_jax.core.exit_codes import ExitCode
from qwen3_moe_jax.core.output_file import check_output
from qwen3_moe_jax.core.pictures import INSTALL, PICTURES, can_draw
from qwen3_moe_jax.inspection.experts import ExpertUsage, difference, expert_usage
from qwen3_moe_jax.parity.recorded import parity_text

DEFAULT_PICTURE = "experts.png"
NO_PICTURE = f"no picture: {INSTALL}"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "text",
        nargs="?",
        type=options.text,
        help="the text; - reads standard input (default: some Python source)",
    )
    parser.add_argument("-f", "--file", type=options.path, metavar="FILE", help="read the text from a file")
    parser.add_argument(
        "--against",
        type=options.text,
        metavar="TEXT",
        help="a second text: both on one scale, and the difference",
    )
    parser.add_argument(
        "--against-file", type=options.path, metavar="FILE", help="read the second text from a file"
    )
    parser.add_argument(
        "-o",
        "--picture",
        type=options.output(*PICTURES),
        metavar="FILE",
        help=f"where the picture goes, by the extra [plot]: {', '.join(PICTURES)} "
        f"(default: {DEFAULT_PICTURE}; none with --json)",
    )
    parser.add_argument(
        "--npz", type=options.output(), metavar="FILE.npz", help="write counts and shares here"
    )
    parser.add_argument("--json", action="store_true", help="counts as one JSON object")
    add_model_arguments(parser)


def run(args: argparse.Namespace) -> int:
    texts = _texts(args)
    _choose_picture(args)
    with load_model(args) as model:
        name = str(model.source.metadata.get("general.name", model.source.path.name))
        usages = [
            expert_usage(model.runner, model.tokenizer.encode(text), model=name, text=text[:200])
            for text in texts
        ]
    first, second = usages[0], usages[1] if len(usages) > 1 else None
    if args.picture:
        first.save_picture(args.picture, second)
    if args.npz:
        first.save_arrays(args.npz, second)
    if args.json:
        terminal.show_json(_json(first, args) | ({"against": _counts(second)} if second else {}))
    else:
        show(first)
        if second is not None:
            show(second, first)
        written = [("picture", args.picture), ("arrays", args.npz)]
        terminal.show(", ".join(f"{kind}: {path}" for kind, path in written if path) or NO_PICTURE)
    return ExitCode.DONE


def _choose_picture(args: argparse.Namespace) -> None:
    """The default picture, where one can be drawn; a picture that is asked for must be."""
    if args.picture is None and not args.json and can_draw():
        args.picture = check_output(DEFAULT_PICTURE)
    picture_path(args)


def _texts(args: argparse.Namespace) -> list[str]:
    """The text that is asked for, and the second one if there is one.

    Raises:
      OptionError: one is empty or named twice, or both are standard input.
    """
    sources = [_source(args.text, args.file, "a text and --file")]
    sources += [_source(args.against, args.against_file, "--against and --against-file")]
    if sources[0] == sources[1] == ("file", "-"):
        raise OptionError("both texts are standard input: read one from a file")
    found = [parity_text() if sources[0] is None else _read(*sources[0])]
    return found if sources[1] is None else [*found, _read(*sources[1])]


def _source(text: str | None, file: str | None, names: str) -> tuple[str, str] | None:
    if file and text:
        raise OptionError(f"{names} are given: give one")
    if text == "-":
        return "file", "-"
    return ("file", file) if file else ("text", text) if text else None


def _read(kind: str, value: str) -> str:
    text = value if kind == "text" else terminal.read_text(value)
    if not text:
        raise OptionError(f"{terminal.input_name(value)} is empty: give at least one character")
    return text


def _json(usage: ExpertUsage, args: argparse.Namespace) -> dict[str, object]:
    return {**_counts(usage), "picture": args.picture, "npz": args.npz}


def _counts(usage: ExpertUsage) -> dict[str, object]:
    return {
        "tokens": usage.tokens,
        "experts_per_token": usage.experts_per_token,
        "counts": usage.counts.tolist(),
        "balance": usage.balance().tolist(),
        "unused": usage.unused().tolist(),
    }


def show(usage: ExpertUsage, first: ExpertUsage | None = None) -> None:
    """One line for each layer: the most used experts, the balance, how many are unused.

    Beside a first text, also the experts whose share grew most.
    """
    experts = f"{usage.experts_per_token} of {usage.counts.shape[1]} experts per token"
    terminal.show(*([""] if first else []), f"{counted(usage.tokens, 'token')}, {experts}")
    balance, unused = usage.balance(), usage.unused()
    for layer, share in enumerate(usage.share):
        best = [e for e in sorted(range(len(share)), key=lambda e: -share[e])[:5] if share[e]]
        top = ", ".join(f"{e} ({share[e]:.0%})" for e in best)
        grown = "" if first is None else f"; {_grown(usage, first, layer)}"
        terminal.show(
            f"layer {layer:>3}: most used {top}; balance {balance[layer]:.2f}, {unused[layer]} unused{grown}"
        )


def _grown(usage: ExpertUsage, first: ExpertUsage, layer: int) -> str:
    ratio = np.exp2(np.nan_to_num(difference(first, usage)[layer]))
    best = np.argsort(-ratio, kind="stable")[:2]
    return "more than in the first text: " + ", ".join(f"{e} ({ratio[e]:.1f}x)" for e in best)
