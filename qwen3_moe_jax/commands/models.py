"""``qwen3-moe models``: what is on this machine, whether it runs here, and how fast that may be."""

import argparse
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from qwen3_moe_jax import loader
from qwen3_moe_jax.commands import options
from qwen3_moe_jax.convert.errors import ModelFileError
from qwen3_moe_jax.convert.open_model import open_model
from qwen3_moe_jax.convert.progress import format_bytes
from qwen3_moe_jax.core import terminal
from qwen3_moe_jax.core.exit_codes import ExitCode
from qwen3_moe_jax.hub.cached import Found, hub_cache, in_folders, in_hub_cache, unfinished
from qwen3_moe_jax.machine.estimate import Place, place_of
from qwen3_moe_jax.machine.kept_weights import all_kept
from qwen3_moe_jax.machine.memory import MemoryPlan


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "folders", nargs="*", type=options.path, metavar="FOLDER", help="look here too (default: this folder)"
    )
    parser.add_argument("--json", action="store_true", help="one JSON object")


def run(args: argparse.Namespace) -> int:
    folders = [Path(folder) for folder in args.folders or ["."]]
    embedded = loader.embedded_model()
    found = [
        Found("(no -m)", embedded, "Q4_K_M", embedded.stat().st_size),
        *in_hub_cache(),
        *in_folders(folders),
    ]
    place = place_of(loader.choose_backend().backend)
    rows = [_row(one, place) for one in found]
    rest = [{"repo": repo, "nbytes": nbytes} for repo, nbytes in unfinished()]
    mapped = [
        {"folder": str(folder), "model": kept and kept.source, "nbytes": kept.nbytes if kept else None}
        for folder, kept in all_kept()
    ]
    if args.json:
        report = {"cache": str(hub_cache()), "backend": place.backend, "models": rows, "unfinished": rest}
        terminal.show_json({**report, "mapped_weights": mapped}, indent=2)
    else:
        _print(rows, rest, mapped, place)
    return ExitCode.DONE


def _row(one: Found, place: Place) -> dict[str, Any]:
    """A model's facts; of a file that cannot be used, why."""
    row: dict[str, Any] = {"name": one.name, "path": str(one.path), "kind": one.kind, "nbytes": one.nbytes}
    try:
        with open_model(one.path) as source:
            context = min(loader.DEFAULT_CONTEXT, source.config.max_position_embeddings)
            plan = place.settled(MemoryPlan.of(source, context, place.itemsize))
            free = place.memory.nbytes
            fits = free is None or plan.needed <= free
            why = "" if fits else f"needs {plan.needed / 1e9:.1f} GB, {place.memory}"
            if fits and plan.is_mapped:
                why = f"weights in a file, {plan.share:.0%} fit memory"
            rate = place.rate(source, 0) if fits and not plan.is_mapped else None
            types = sorted({t.name for t in source.types.values()})
            return {**row, "types": types, "runs": fits, "why": why, "estimated_tokens_per_second": rate}
    except ModelFileError as error:
        return {**row, "types": [], "runs": False, "why": str(error), "estimated_tokens_per_second": None}


def _print(
    rows: list[dict[str, Any]], rest: Iterable[dict[str, Any]], mapped: Iterable[dict[str, Any]], place: Place
) -> None:
    width = max(len(row["name"]) for row in rows)
    for row in rows:
        rate = row["estimated_tokens_per_second"]
        digits = ".2g" if rate and rate < 100 else ".0f"
        about = f", about {rate:{digits}} tokens/s" if rate else ""
        speed = "runs" + (f", {row['why']}" if row["why"] else about)
        state = speed if row["runs"] else f"does not run: {row['why']}"
        terminal.show(f"{row['name']:{width}}  {format_bytes(row['nbytes']):>9}  {row['kind']:10}  {state}")
    for one in rest:
        terminal.show(
            f"hf:{one['repo']}: {format_bytes(one['nbytes'])} of an unfinished download; pull goes on"
        )
    for one in mapped:
        what = (
            f"{format_bytes(one['nbytes'])} of {one['model']}"
            if one["model"]
            else "damaged, or being written"
        )
        terminal.show(f"{one['folder']}: mapped weights, {what}; delete the folder to remove them")
    terminal.show(
        f"Rates are estimates for {place.backend}: the bytes that a token reads, and {place.origin}. "
        f"Cache: {hub_cache()}"
    )
