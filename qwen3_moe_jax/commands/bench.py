"""``qwen3-moe bench``: decode, prefill and batches, beside what the machine allows."""

import argparse
import importlib.metadata
import os
import platform
from pathlib import Path
from typing import Any

from qwen3_moe_jax.commands import options
from qwen3_moe_jax.commands.common import (
    add_model_arguments,
    add_picture,
    add_processes,
    banner,
    load_model,
    picture_path,
)
from qwen3_moe_jax.convert.config import Qwen3MoeConfig
from qwen3_moe_jax.convert.open_model import open_model
from qwen3_moe_jax.core import terminal
from qwen3_moe_jax.core.errors import OptionError
from qwen3_moe_jax.core.exit_codes import ExitCode
from qwen3_moe_jax.core.pictures import drawn
from qwen3_moe_jax.core.terminal import explain_if_slow
from qwen3_moe_jax.loader import model_path
from qwen3_moe_jax.machine.nvidia import nvidia_gpus
from qwen3_moe_jax.measure.benchmark import FAILED, MEASURED, Benchmark, Row, Workload, plan
from qwen3_moe_jax.measure.plots import draw_bench

EPILOG = """\
Rows are llama-bench's: pp512 reads a prompt of 512 tokens, tg128 writes 128 tokens after an empty cache,
tg128 @ d4096 after 4096 tokens, 8 x tg128 @ d512 for 8 sequences at once. The first run of each row, which
compiles, is not counted. The share is of what the machine allows: memory speed for writing, arithmetic for
prompts. A row that cannot be measured says why, and the others go on. How to compare: docs/guides/bench.md
"""

PROMPT_TOKENS, NEW_TOKENS, DEPTHS, BATCHES = (512,), 128, (0, 4096), (1, 8, 32)

SMALL_READ = 64 << 20
"""Bytes a step below which caches, or the cost of launches, count for more than memory."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = EPILOG
    group = parser.add_argument_group("rows (an option without numbers leaves its rows out)")
    group.add_argument(
        "-p",
        "--prompt-tokens",
        type=options.number(1),
        nargs="*",
        metavar="N",
        help="lengths of prompts (default: 512)",
    )
    group.add_argument(
        "-n",
        "--new-tokens",
        type=options.number(1),
        metavar="N",
        default=NEW_TOKENS,
        help="tokens to write (default: 128)",
    )
    group.add_argument(
        "-d",
        "--depth",
        type=options.number(0),
        nargs="*",
        metavar="N",
        help="tokens in the cache before (default: 0 4096)",
    )
    group.add_argument(
        "-b",
        "--batch",
        type=options.number(1),
        nargs="*",
        metavar="B",
        help="sequences at once, after prompts of the first -p (default: 1 8 32; jax alone)",
    )
    parser.add_argument(
        "-r", "--repeats", type=options.number(1), default=3, metavar="N", help="counted runs of a row (3)"
    )
    parser.add_argument(
        "--max-seconds",
        type=options.seconds,
        default=120.0,
        metavar="S",
        help="begin no further run of a row after this time, and leave out one that would take longer (120)",
    )
    add_picture(parser, "the rates by depth and by batch beside what the machine allows")
    parser.add_argument("--json", action="store_true", help="one JSON object with every figure, nothing else")
    add_model_arguments(parser, context_help="tokens of the KV cache (default: what the rows need)")
    add_processes(parser)


def run(args: argparse.Namespace) -> int:
    picture_path(args)
    with open_model(model_path(args.model)) as source:
        workloads = planned(args, source.config)
    args.context = args.context or max([w.context for w in workloads if not w.sequences], default=None)
    rows: list[Row] = []
    interrupted = False
    with load_model(args, show_banner=False) as model:
        with explain_if_slow("measuring what the machine allows ...", quiet=args.quiet):
            benchmark = Benchmark(
                model.source, model.runner, repeats=args.repeats, max_seconds=args.max_seconds
            )
        facts = machine_facts(model.runner.describe())
        if not args.json:
            terminal.show(*banner(model), *_versions(facts), "", *_table_head(workloads))
        try:
            for found in _measured(benchmark, workloads, quiet=args.quiet):
                rows += found
                if not args.json:
                    terminal.show(*(_table_line(row, workloads) for row in found))
        except KeyboardInterrupt:
            interrupted = True
            terminal.error("interrupted: the rows so far")
        if args.json:
            terminal.show_json(_report(args, model, benchmark, facts, rows))
        else:
            terminal.show(*_notes(benchmark, rows))
        if args.picture:
            _draw(args, banner(model), facts, rows)
    if interrupted:
        return ExitCode.INTERRUPTED
    return ExitCode.FAULT if any(row.outcome == FAILED for row in rows) else ExitCode.DONE


def _draw(args: argparse.Namespace, lines: tuple[str, ...], facts: dict[str, Any], rows: list[Row]) -> None:
    if not any(row.outcome == MEASURED for row in rows):
        terminal.note("no row was measured: no picture")
        return
    drawn(args.picture, lambda: draw_bench(rows, title=lines[0], facts="; ".join(_versions(facts))))
    if not args.json:
        terminal.show(f"picture: {args.picture}")


def planned(args: argparse.Namespace, config: Qwen3MoeConfig) -> list[Workload]:
    """The rows that are asked for.

    Raises:
      OptionError: no row is left, or one needs more tokens than the model or --context takes.
    """
    maximum = config.max_position_embeddings if args.context is None else args.context
    depths = _default_depths(args.new_tokens, maximum) if args.depth is None else args.depth
    prompt_tokens = PROMPT_TOKENS if args.prompt_tokens is None else args.prompt_tokens
    batches = BATCHES if args.batch is None else args.batch
    batch_prompt = (*prompt_tokens, *PROMPT_TOKENS)[0]
    workloads = plan(prompt_tokens, args.new_tokens, depths, batches, batch_prompt)
    if not workloads:
        raise OptionError("no row is left: give --prompt-tokens, --depth or --batch a number")
    for w in workloads:
        if w.context > maximum:
            what = "the model takes" if args.context is None else "--context is"
            raise OptionError(f"{w.name} needs {w.context} tokens of context, and {what} {maximum}")
    return workloads


def _default_depths(new_tokens: int, maximum: int) -> list[int]:
    """The usual ones, halved until they fit a model with a short context."""
    depths = []
    for depth in DEPTHS:
        while depth and Workload("tg", new_tokens, depth).context > maximum:
            depth //= 2
        depths.append(depth)
    return list(dict.fromkeys(depths))


def _measured(benchmark: Benchmark, workloads: list[Workload], *, quiet: bool):
    """Rows as they come, with a word on standard error about those that take long."""
    rows = benchmark.rows(workloads)
    done = 0
    while done < len(workloads):
        with explain_if_slow(f"measuring {workloads[done].name} ...", quiet=quiet):
            found = next(rows)
        done += len(found)
        yield found


def machine_facts(backend: dict[str, object]) -> dict[str, Any]:
    """What a figure should never be quoted without: machine, its load, and versions."""
    packages = ["numpy", *(["jax", "jaxlib"] if backend["backend"] == "jax" else [])]
    packages += ["wgpu"] if backend["backend"] == "wgpu" else []
    return {
        "processor": _processor(),
        "cores": os.cpu_count(),
        "load": round(os.getloadavg()[0], 1) if hasattr(os, "getloadavg") else None,
        "gpus": [f"{gpu.name}, driver {gpu.driver}" for gpu in nvidia_gpus()],
        "system": platform.platform(),
        "versions": {
            "python": platform.python_version(),
            **{p: importlib.metadata.version(p) for p in packages},
        },
    }


def _processor() -> str:
    """The processor's own name where the system tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def _versions(facts: dict[str, Any]) -> tuple[str, str]:
    load = "" if facts["load"] is None else f", load {facts['load']:g}"
    versions = ", ".join(f"{name} {version}" for name, version in facts["versions"].items())
    machine = "; ".join([f"{facts['processor']}, {facts['cores']} cores{load}", *facts["gpus"]])
    return machine, versions


def _width(workloads: list[Workload]) -> int:
    return max(len(w.name) for w in workloads)


def _table_head(workloads: list[Workload]) -> tuple[str, str]:
    name = "test".ljust(_width(workloads))
    rule = "-" * _width(workloads)
    return (
        f"| {name} | t/s, best | t/s, median | runs | limit, t/s | share |",
        f"| {rule} | --------: | ----------: | ---: | ---------: | ----: |",
    )


def _table_line(row: Row, workloads: list[Workload]) -> str:
    name = row.workload.name.ljust(_width(workloads))
    if row.outcome != MEASURED or row.timing is None:
        return f"| {name} | {row.outcome}: {row.reason} |"
    limit = f"{row.limit:10,.0f}" if row.limit else f"{'-':>10}"
    share = f"{row.share:5.1%}" if row.share else f"{'-':>5}"
    return (
        f"| {name} | {row.best:9,.1f} | {row.median:11,.1f} | {len(row.timing.runs):4} | {limit} | {share} |"
    )


def _notes(benchmark: Benchmark, rows: list[Row]) -> list[str]:
    """Where the limits come from, and what to know before quoting the figures."""
    kinds = {row.limited_by for row in rows}
    lines = [""]
    for kind, limit, unit in (
        ("memory", benchmark.limits.memory, "GB/s"),
        ("arithmetic", benchmark.limits.arithmetic, "GFLOP/s"),
    ):
        if kind in kinds:
            rate = f"{limit.rate / 1e9:,.0f} {unit}: " if limit.rate else ""
            lines.append(f"limit of {'tg' if kind == 'memory' else 'pp'}: {rate}{limit.origin}")
    written = [row.workload for row in rows if row.limited_by == "memory"]
    if written:
        nbytes = benchmark.step_nbytes(written[0])
        lines.append(f"a token of {written[0].name} reads at least {nbytes / 1e6:,.1f} MB")
        if nbytes < SMALL_READ:
            lines.append(
                "so little stays in caches, and launches cost more: its share says little about memory"
            )
    lines.append("t/s: tokens of all sequences per second; a row's first run, which compiles, does not count")
    return lines


def _report(args, model, benchmark: Benchmark, facts: dict[str, Any], rows: list[Row]) -> dict[str, Any]:
    memory = model.runner.memory() if model.runner.name == "jax" else None
    limits = benchmark.limits
    return {
        "machine": facts,
        "model": {
            "name": model.source.metadata.get("general.name", model.source.path.name),
            "path": str(model.source.path),
            "nbytes": model.source.nbytes,
            "identity": model.source.identity,
        },
        "backend": {**model.runner.describe(), "reason": model.backend_reason},
        "context": model.runner.max_context,
        "device_memory": memory,
        "limits": {
            "memory_bytes_per_s": limits.memory.rate,
            "memory_origin": limits.memory.origin,
            "operations_per_s": limits.arithmetic.rate,
            "operations_origin": limits.arithmetic.origin,
        },
        "repeats": args.repeats,
        "rows": [row.as_dict() for row in rows],
    }
