"""``qwen3-moe inspect``: metadata, tensors and types of a model file, and what will run on them."""

import argparse
from collections import Counter

from qwen3_moe_jax import loader
from qwen3_moe_jax.commands import options
from qwen3_moe_jax.commands.common import add_model
from qwen3_moe_jax.convert.errors import ModelFileError
from qwen3_moe_jax.convert.gguf_file import GGUFFile
from qwen3_moe_jax.convert.open_model import open_model
from qwen3_moe_jax.core import terminal
from qwen3_moe_jax.core.errors import OptionError
from qwen3_moe_jax.core.exit_codes import ExitCode

LONGEST_VALUE = 100


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "file", nargs="?", type=options.path, metavar="MODEL", help="the same as --model MODEL"
    )
    add_model(parser)
    parser.add_argument("--tensors", action="store_true", help="list every tensor")
    parser.add_argument("--sha256", action="store_true", help="hash the whole file")
    parser.add_argument("--json", action="store_true", help="one JSON object")


def run(args: argparse.Namespace) -> int:
    if args.file and args.model:
        raise OptionError("two models are given: give one")
    args.model = args.model or args.file
    try:
        return _inspect_model(args)
    except ModelFileError as error:
        if error.code != "E_ARCH":
            raise
        _print_foreign(args.model)
        raise


def _print_foreign(path: str) -> None:
    """What can be said of a GGUF file of another architecture."""
    with GGUFFile.open(path) as file:
        size = f"{file.nbytes / 1e9:.3f} GB, {len(file.tensors)} tensors"
        terminal.show(path, size, "", "metadata")
        terminal.show(*(f"  {key} = {_short(value)}" for key, value in file.metadata.items()))


def _inspect_model(args: argparse.Namespace) -> int:
    with open_model(loader.model_path(args.model)) as source:
        report = {
            "path": str(source.path),
            "nbytes": source.nbytes,
            "identity": source.identity,
            "config": {k: v for k, v in vars(source.config).items() if k != "rope_scaling"},
            "rope_scaling": source.config.rope_scaling and vars(source.config.rope_scaling),
            "types": Counter(t.name for t in source.types.values()),
            "metadata": {k: _short(v) for k, v in source.metadata.items()},
            "tensors": [
                {"path": p, "type": source.types[p].name, "shape": s.shape} for p, s in source.specs.items()
            ],
        }
        if args.sha256:
            report["sha256"] = source.sha256()
    if args.json:
        terminal.show_json(report, indent=2)
    else:
        _print(report, args.tensors)
    return ExitCode.DONE


def _short(value: object) -> object:
    """Long arrays and texts as a summary."""
    if isinstance(value, list | tuple) and len(value) > 8:
        return f"[{len(value)} values: {', '.join(repr(v) for v in value[:4])}, ...]"
    if isinstance(value, str) and len(value) > LONGEST_VALUE:
        return f"{value[:LONGEST_VALUE]!r}... ({len(value)} characters)"
    return value


def _print(report: dict, tensors: bool) -> None:
    kinds = ", ".join(f"{n} {t}" for t, n in sorted(report["types"].items()))
    size = f"{report['nbytes'] / 1e9:.3f} GB, {len(report['tensors'])} tensors: {kinds}"
    terminal.show(report["path"], size)
    terminal.show(*(f"{key} {report[key]}" for key in ("sha256", "identity") if key in report))
    config = dict(report["config"])
    if report["rope_scaling"]:
        config["rope_scaling"] = report["rope_scaling"]
    for title, values in (("config", config), ("metadata", report["metadata"])):
        terminal.show("", title, *(f"  {key} = {value}" for key, value in values.items()))
    if tensors:
        rows = (f"  {t['type']:5} {_shape(t):>16}  {t['path']}" for t in report["tensors"])
        terminal.show("", "tensors", *rows)


def _shape(tensor: dict) -> str:
    return "x".join(map(str, tensor["shape"]))
