"""``qwen3-moe inspect``: metadata, tensors and types of a model file, and what will run on them."""

import argparse
import os
from typing import Any

from qwen3_moe_jax import loader
from qwen3_moe_jax.commands import options
from qwen3_moe_jax.commands.common import add_model
from qwen3_moe_jax.convert.progress import format_bytes
from qwen3_moe_jax.core import terminal
from qwen3_moe_jax.core.errors import OptionError
from qwen3_moe_jax.core.exit_codes import ExitCode
from qwen3_moe_jax.hub import names
from qwen3_moe_jax.hub.header import headers_of, without_folder
from qwen3_moe_jax.hub.listing import ask
from qwen3_moe_jax.hub.pull import choose, is_cached
from qwen3_moe_jax.inspection.file_report import is_supported, report_on
from qwen3_moe_jax.machine.estimate import machine_memory


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "file", nargs="?", type=options.path, metavar="MODEL", help="the same as --model MODEL"
    )
    add_model(parser)
    parser.add_argument("--tensors", action="store_true", help="list every tensor")
    parser.add_argument(
        "--no-estimates", action="store_true", help="say nothing of this machine: about a second quicker"
    )
    parser.add_argument("--sha256", action="store_true", help="hash the whole file")
    parser.add_argument("--json", action="store_true", help="one JSON object")


def run(args: argparse.Namespace) -> int:
    if args.file and args.model:
        raise OptionError("two models are given: give one")
    report = _report(args.model or args.file, args)
    if args.json:
        terminal.show_json(report, indent=2)
    else:
        _print(report, args.tensors)
    if fault := report.get("fault"):
        terminal.error(f"{fault}: {report['advice']}")
        return ExitCode.FAULT
    return ExitCode.DONE


def _report(model: str | None, args: argparse.Namespace) -> dict[str, Any]:
    """Of a file that is here, or of one that a hub has: then its header alone is read, not the model."""
    options = {"estimates": not args.no_estimates}
    name = None if model is None or os.path.exists(model) else names.parse(model)
    if name is None or is_cached(name):
        return report_on(loader.model_path(model), **options, sha256=args.sha256)
    if args.sha256:
        raise OptionError("--sha256 reads the whole model: `qwen3-moe pull` it first")
    listing = ask(name)
    variant = listing.named(name) or choose(listing, machine_memory())
    with headers_of(listing, variant) as path:
        report = report_on(path, **options)
    report["path"] = f"{name}: {variant.label}, not downloaded, its header alone was read"
    if "fault" in report:
        report["fault"] = without_folder(report["fault"])
    return {key: value for key, value in report.items() if key != "identity"}


def _print(report: dict[str, Any], tensors: bool) -> None:
    kinds = ", ".join(f"{n} {_marked(t)}" for t, n in sorted(report["types"].items()))
    size = f"{report['nbytes'] / 1e9:.3f} GB, {len(report['tensors'])} tensors: {kinds}"
    terminal.show(report["path"], size)
    terminal.show(*(f"{key} {report[key]}" for key in ("sha256", "identity") if key in report))
    terminal.show(*(f"warning: {text}" for text in report.get("warnings", ())))
    if fault := report.get("fault"):
        terminal.show(f"does not run here: {fault}")
    if here := report.get("here"):
        _print_here(here)
    if config := dict(report.get("config", {})):
        if report["rope_scaling"]:
            config["rope_scaling"] = report["rope_scaling"]
        terminal.show("", "config", *(f"  {key} = {value}" for key, value in config.items()))
    terminal.show("", "metadata", *(f"  {key} = {value}" for key, value in report["metadata"].items()))
    terminal.show("", "tensor groups", *map(_group, report["groups"]))
    if tensors:
        terminal.show("", "tensors", *map(_tensor, report["tensors"]))


def _print_here(here: dict[str, Any]) -> None:
    parts = ", ".join(f"{t}: {i}" for t, i in here["implementations"].items())
    terminal.show("", f"will run with {here['backend']} ({parts}); {here['memory']}")
    terminal.show("  context   KV cache     in all            at that depth (estimates)")
    terminal.show(*map(_context, here["contexts"]))
    terminal.show(f"  rates from the bytes that a token reads and {here['bandwidth_origin']}")


def _context(row: dict[str, Any]) -> str:
    fits = {True: "fits", False: "does not fit", None: "unknown"}[row["fits"]]
    fits = "from a file" if row["fits"] and row["weights_in_a_file"] else fits
    rate = row["estimated_tokens_per_second"]
    speed = (
        "rate not known"
        if rate is None
        else f"about {rate:.2g} tokens/s"
        if rate < 100
        else f"about {rate:.0f} tokens/s"
    )
    sizes = f"{format_bytes(row['cache']):>9}  {format_bytes(row['total']):>9}"
    return f"  {row['context']:>7}  {sizes}  {fits:14}  {speed}"


def _marked(type_name: str) -> str:
    return type_name if is_supported(type_name) else f"{type_name} (NOT SUPPORTED)"


def _group(group: dict[str, Any]) -> str:
    kinds = ", ".join(f"{n} {_marked(t)}" for t, n in sorted(group["types"].items()))
    return f"  {group['name']:32} {format_bytes(group['nbytes']):>9}  {kinds}"


def _tensor(t: dict[str, Any]) -> str:
    shape = "x".join(map(str, t["shape"]))
    path = f"  {t['path']}" if t["path"] else ""
    return f"  {_marked(t['type']):5} {shape:>16} {t['nbytes']:>12}  {t['name']}{path}"
