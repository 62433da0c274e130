"""``qwen3-moe verify``: the parity contract on this machine, with a verdict and a receipt."""

import argparse
import json
import sys
import threading
import time
from contextlib import closing
from functools import partial
from pathlib import Path

from rich.console import Console

from qwen3_moe_jax import loader
from qwen3_moe_jax.convert.model_source import ModelSource, open_model
from qwen3_moe_jax.parity.clauses import FAILED, NOT_APPLICABLE, PASSED, Finding
from qwen3_moe_jax.parity.contract import Contract, load_contract
from qwen3_moe_jax.parity.verify import MIN_TOKENS, TEXT_TOKENS, Report, Unloaded, verify

TARGETS = ("reference", "jax", "jax:bfloat16", "wgpu")

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
            print(f"...   {what:<16} {subject:<18} {elapsed:.0f} s", file=sys.stderr, flush=True)
            if self._timer is timer:
                self._tell_later(what, subject, began, 2 * elapsed)

        timer = threading.Timer(seconds - (time.perf_counter() - began), tell)
        timer.daemon = True
        self._timer = timer
        timer.start()


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "-m", "--model", help="a .gguf file or a packed checkpoint folder (default: the embedded model)"
    )
    parser.add_argument(
        "--backend",
        action="append",
        choices=TARGETS,
        help="what to verify; may be given several times (default: reference, jax and jax:bfloat16)",
    )
    parser.add_argument("--adapter", metavar="NAME", help="part of the WebGPU adapter's name (wgpu)")
    parser.add_argument(
        "--tokens",
        type=_text_length,
        default=TEXT_TOKENS,
        metavar="N",
        help=f"length of the text, at least {MIN_TOKENS} ({TEXT_TOKENS})",
    )
    parser.add_argument(
        "--clause", action="append", metavar="ID", help="check this clause only; may be given several times"
    )
    parser.add_argument("--contract", action="store_true", help="list the clauses and end")
    parser.add_argument("--receipt", metavar="FILE", help="write the JSON receipt here")
    parser.add_argument("--json", action="store_true", help="the receipt on standard output, nothing else")


def _text_length(text: str) -> int:
    """The value of ``--tokens``.

    Raises:
      argparse.ArgumentTypeError: it is no integer, or less than the clauses need.
    """
    if not text.lstrip("+-").isdecimal() or int(text) < MIN_TOKENS:
        raise argparse.ArgumentTypeError(f"{text!r} is no length to verify with: give at least {MIN_TOKENS}")
    return int(text)


def run(args: argparse.Namespace) -> int:
    if args.contract:
        show_contract(load_contract(), as_json=args.json)
        return 0
    console = Console(stderr=args.json, soft_wrap=True, highlight=False)
    waits = Waits()

    def found(finding: Finding) -> None:
        waits.close()
        show_finding(console, finding)

    with open_model(args.model or loader.embedded_model()) as source, closing(waits):
        runners = unloaded_runners(source, args.backend or TARGETS[:3], args.adapter)
        report = verify(
            source,
            runners,
            text_tokens=args.tokens,
            clauses=args.clause,
            progress=found,
            begins=waits.begins,
        )
    show_verdict(console, report)
    if args.receipt:
        Path(args.receipt).write_text(report.to_json() + "\n")
        console.print(f"receipt: {args.receipt}")
    if args.json:
        sys.stdout.write(report.to_json() + "\n")
    return 0 if report.passed else 1


def unloaded_runners(source: ModelSource, targets: list[str], adapter: str | None) -> list[Unloaded]:
    """One backend for each of ``targets`` ("jax:bfloat16"), loaded when it is needed."""
    context = min(DEFAULT_CONTEXT, source.config.max_position_embeddings)
    runners = []
    for target in dict.fromkeys(targets):
        backend, _, dtype = target.partition(":")
        options = {"max_context": context, "dtype": dtype or "float32", "adapter": adapter}
        on_gpu = backend == "jax" and loader.jax_sees_gpu()
        runners.append(Unloaded(partial(loader.make_runner, source, backend, **options), context, on_gpu))
    return runners


def show_finding(console: Console, finding: Finding) -> None:
    """One line, as soon as it is known."""
    mark, style = MARKS[finding.verdict]
    console.print(f"[{style}]{mark:4}[/]  {finding.clause:<16} {finding.subject:<18} ", end="", markup=True)
    console.print(finding.note, markup=False)


def show_verdict(console: Console, report: Report) -> None:
    """What failed and by how much, then the verdict in one line."""
    clauses = load_contract().clauses
    for finding in report.failures:
        clause = clauses[finding.clause]
        console.print(f"\n{finding.clause} of {finding.subject}: {clause.statement}", markup=False)
        if finding.figure is not None:
            sign = "at least" if clause.kind == "at_least" else "at most"
            console.print(f"  {clause.measure}: {finding.figure:.9g}, promised {sign} {finding.bound:.9g}")
        console.print(f"  {finding.note}", markup=False)
    if report.failures:
        console.print("\n`qwen3-moe bisect` names the stage, the tensor and the likely cause.", markup=False)
    style = "bold green" if report.passed else "bold red"
    console.print(f"\n[{style}]{report.summary()}[/]")


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
        print(json.dumps({"version": contract.version, "clauses": rows}, indent=1))
        return
    print(f"Parity contract, version {contract.version}")
    for clause in contract.clauses.values():
        bounds = ", ".join(
            f"{bound:g} {kind and f'({kind})'}".strip() for kind, bound in clause.bounds.items()
        )
        print(f"\n{clause.id}  {clause.statement}")
        print(
            f"    {clause.measure}: {clause.kind.replace('_', ' ')} {bounds} ({', '.join(clause.backends)})"
        )
        print(f"    falsified by {clause.test}")
