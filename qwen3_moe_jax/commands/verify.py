"""``qwen3-moe verify``: the parity contract on this machine, with a verdict and a receipt."""

import argparse
import threading
import time
from collections.abc import Sequence
from contextlib import closing
from functools import partial

from qwen3_moe_jax import loader
from qwen3_moe_jax.commands import options
from qwen3_moe_jax.commands.common import (
    add_adapter,
    add_kernels,
    add_mesh,
    add_model,
    add_processes,
    dtype_of,
    runner_options,
)
from qwen3_moe_jax.convert.open_model import open_model
from qwen3_moe_jax.convert.source import ModelSource
from qwen3_moe_jax.core import terminal
from qwen3_moe_jax.core.exit_codes import ExitCode
from qwen3_moe_jax.core.output_file import open_output
from qwen3_moe_jax.machine import processes
from qwen3_moe_jax.machine.kernels import NATIVE
from qwen3_moe_jax.parity.clauses import FAILED, NOT_APPLICABLE, PASSED, Finding
from qwen3_moe_jax.parity.contract import Contract, load_contract
from qwen3_moe_jax.parity.evidence import PROMPT_TOKENS
from qwen3_moe_jax.parity.gate import first_forward
from qwen3_moe_jax.parity.verify import MIN_TOKENS, TEXT_TOKENS, Report, Unloaded, verify

TARGETS = ("reference", "jax", "jax:bfloat16", "jax:native", "wgpu", "wgpu:float32")

MARKS = {PASSED: ("pass", "green"), FAILED: ("FAIL", "bold red"), NOT_APPLICABLE: ("n/a", "dim")}

DEFAULT_CONTEXT = 2304
"""Tokens of cache: the text and what is written after it."""

SECONDS_UNTOLD = 2.0
"""After so long it is said what verify is at, and again each time that it has taken twice as long."""


class Waits:
    """Says on standard error what is being waited for."""

    def __init__(self):
        self._timer: threading.Timer | None = None

    def begins(self, what: str, subject: str) -> None:
        """Something else is turned to."""
        self.close()
        self._tell_later(what, subject, time.perf_counter(), SECONDS_UNTOLD)

    def close(self) -> None:
        """Nothing is waited for."""
        if self._timer:
            self._timer.cancel()
        self._timer = None

    def _tell_later(self, what: str, subject: str, began: float, seconds: float) -> None:
        def tell() -> None:
            elapsed = time.perf_counter() - began
            terminal.note(f"...   {what:<16} {subject:<18} {elapsed:.0f} s")
            if self._timer is timer:
                self._tell_later(what, subject, began, 2 * elapsed)

        timer = threading.Timer(seconds - (time.perf_counter() - began), tell)
        timer.daemon = True
        self._timer = timer
        timer.start()


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model(parser)
    parser.add_argument(
        "--backend",
        action="append",
        choices=TARGETS,
        help="what to verify; may be given several times (default: reference, jax, jax:bfloat16, and on "
        "a CPU that has them jax:native)",
    )
    add_kernels(parser)
    add_mesh(parser)
    add_adapter(parser)
    add_processes(parser)
    parser.add_argument(
        "--tokens",
        type=options.number(MIN_TOKENS),
        default=TEXT_TOKENS,
        metavar="N",
        help=f"length of the text, at least {MIN_TOKENS} ({TEXT_TOKENS})",
    )
    parser.add_argument(
        "--clause", action="append", metavar="ID", help="check this clause only; may be given several times"
    )
    parser.add_argument("--contract", action="store_true", help="list the clauses and end")
    parser.add_argument(
        "--receipt", type=options.output(), metavar="FILE", help="write the JSON receipt here"
    )
    parser.add_argument("--json", action="store_true", help="the receipt on standard output, nothing else")


def run(args: argparse.Namespace) -> int:
    if args.contract:
        show_contract(load_contract(), as_json=args.json)
        return ExitCode.DONE
    if args.mesh is not None:
        loader.check_mesh(args.mesh, "jax")
    waits = Waits()

    def found(finding: Finding) -> None:
        waits.close()
        show_finding(finding, notes=args.json)

    with open_model(loader.model_path(args.model)) as source, closing(waits):
        processes.check_all_have({"model file": source.content}, what="model file")
        loader.start_gpu()
        targets = args.backend or default_targets(is_split=args.mesh is not None)
        runners = unloaded_runners(source, targets, args)
        report = verify(
            source,
            runners,
            text_tokens=args.tokens,
            clauses=args.clause,
            progress=found,
            begins=waits.begins,
        )
    show_verdict(report, notes=args.json)
    if args.receipt:
        with open_output(args.receipt) as file:
            file.write(f"{report.to_json()}\n".encode())
        _show(f"receipt: {args.receipt}", notes=args.json)
    if args.json:
        terminal.show_text(f"{report.to_json()}\n")
    return ExitCode.DONE if report.passed else ExitCode.FAULT


def default_targets(is_split: bool = False) -> tuple[str, ...]:
    """What is verified unless told: every way in which this machine may compute, but WebGPU.

    Args:
      is_split: over a mesh, where the native kernels do not run.
    """
    return TARGETS[:3] if is_split or loader.native_kernels_against() else TARGETS[:4]


def unloaded_runners(source: ModelSource, targets: Sequence[str], args: argparse.Namespace) -> list[Unloaded]:
    """One backend for each of ``targets`` ("jax:bfloat16"), loaded when it is needed."""
    context = min(DEFAULT_CONTEXT, source.config.max_position_embeddings)
    runners = []
    for target in dict.fromkeys(targets):
        backend, _, dtype = target.partition(":")
        options = {"max_context": context, "dtype": dtype_of(target), **runner_options(backend, args)}
        if dtype == NATIVE:
            options |= {"dtype": None, "kernels": NATIVE}
        on_gpu = backend == "jax" and loader.jax_sees_gpu()
        if on_gpu:  # what the first clauses wait for is compiled beside the load
            options |= {"first_prompt": PROMPT_TOKENS, "first_forward": first_forward(source)}
            options |= {"others_follow": False}
        runners.append(Unloaded(partial(loader.make_runner, source, backend, **options), context, on_gpu))
    return runners


def _show(text: str, style: str | None = None, *, notes: bool) -> None:
    terminal.show_styled((text, style), notes=notes)


def show_finding(finding: Finding, *, notes: bool = False) -> None:
    """One line with the seconds of waiting, as soon as it is known; on standard error if ``notes``."""
    mark, style = MARKS[finding.verdict]
    rest = f"  {finding.clause:<16} {finding.subject:<18} {finding.seconds:5.1f} s  {finding.note}"
    terminal.show_styled((f"{mark:4}", style), (rest, None), notes=notes)


def show_verdict(report: Report, *, notes: bool = False) -> None:
    """What failed and by how much, then the verdict in one line."""
    clauses = load_contract().clauses
    for finding in report.failures:
        clause = clauses[finding.clause]
        _show("", notes=notes)
        _show(f"{finding.clause} of {finding.subject}: {clause.statement}", notes=notes)
        if finding.figure is not None:
            sign = "at least" if clause.kind == "at_least" else "at most"
            bound = f"promised {sign} {finding.bound:.9g}"
            _show(f"  {clause.measure}: {finding.figure:.9g}, {bound}", notes=notes)
        _show(f"  {finding.note}", notes=notes)
    _show("", notes=notes)
    if report.failures:
        _show("`qwen3-moe bisect` names the stage, the tensor and the likely cause.", notes=notes)
        _show("", notes=notes)
    _show(report.summary(), "bold green" if report.passed else "bold red", notes=notes)


def show_contract(contract: Contract, *, as_json: bool = False) -> None:
    """Every clause with its bound and the test that can falsify it."""
    if as_json:
        rows = [
            {
                "id": c.id,
                "statement": c.statement,
                "measure": c.measure,
                c.kind: dict(c.bounds) if "" not in c.bounds else c.bounds[""],
                "backends": list(c.backends),
                "test": c.test,
            }
            for c in contract.clauses.values()
        ]
        terminal.show_json({"version": contract.version, "clauses": rows}, indent=1)
        return
    terminal.show(f"Parity contract, version {contract.version}")
    for clause in contract.clauses.values():
        bounds = ", ".join(
            f"{bound:g} {kind and f'({kind})'}".strip() for kind, bound in clause.bounds.items()
        )
        terminal.show(
            "",
            f"{clause.id}  {clause.statement}",
            f"    {clause.measure}: {clause.kind.replace('_', ' ')} {bounds} ({', '.join(clause.backends)})",
            f"    falsified by {clause.test}",
        )
