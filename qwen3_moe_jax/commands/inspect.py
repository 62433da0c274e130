"""``qwen3-moe inspect``: metadata, tensors and types of a model file, and what will run on them."""

import argparse
import json
from collections import Counter

from qwen3_moe_jax import loader
from qwen3_moe_jax.convert.errors import ModelFileError
from qwen3_moe_jax.convert.gguf_file import GGUFFile
from qwen3_moe_jax.convert.model_source import open_model

LONGEST_VALUE = 100


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "model", nargs="?", help="a .gguf file or a packed checkpoint (default: the embedded model)"
    )
    parser.add_argument("--tensors", action="store_true", help="list every tensor")
    parser.add_argument("--sha256", action="store_true", help="hash the whole file")
    parser.add_argument("--json", action="store_true")


def run(args: argparse.Namespace) -> int:
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
        print(f"{path}\n{file.nbytes / 1e9:.3f} GB, {len(file.tensors)} tensors\n\nmetadata")
        for key, value in file.metadata.items():
            print(f"  {key} = {_short(value)}")


def _inspect_model(args: argparse.Namespace) -> int:
    with open_model(args.model or loader.embedded_model()) as source:
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
        print(json.dumps(report, indent=2, default=str))
    else:
        _print(report, args.tensors)
    return 0


def _short(value: object) -> object:
    """Long arrays and texts as a summary."""
    if isinstance(value, list | tuple) and len(value) > 8:
        return f"[{len(value)} values: {', '.join(repr(v) for v in value[:4])}, ...]"
    if isinstance(value, str) and len(value) > LONGEST_VALUE:
        return f"{value[:LONGEST_VALUE]!r}... ({len(value)} characters)"
    return value


def _print(report: dict, tensors: bool) -> None:
    kinds = ", ".join(f"{n} {t}" for t, n in sorted(report["types"].items()))
    print(f"{report['path']}\n{report['nbytes'] / 1e9:.3f} GB, {len(report['tensors'])} tensors: {kinds}")
    for key in ("sha256", "identity"):
        if key in report:
            print(f"{key} {report[key]}")
    print("\nconfig")
    for key, value in report["config"].items():
        print(f"  {key} = {value}")
    if report["rope_scaling"]:
        print(f"  rope_scaling = {report['rope_scaling']}")
    print("\nmetadata")
    for key, value in report["metadata"].items():
        print(f"  {key} = {value}")
    if tensors:
        print("\ntensors")
        for t in report["tensors"]:
            print(f"  {t['type']:5} {'x'.join(map(str, t['shape'])):>16}  {t['path']}")
