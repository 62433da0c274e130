"""``verify``: runs the parity contract on one file, on this machine, for one or several backends."""

import dataclasses
import json
import os
import platform
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
from functools import partial
from importlib import metadata
from itertools import chain
from typing import Any

import numpy as np

from qwen3_moe_jax.convert.source import ModelSource
from qwen3_moe_jax.core.arguments import check_number
from qwen3_moe_jax.core.code_version import code_version
from qwen3_moe_jax.core.errors import MemoryPlanError, OptionError
from qwen3_moe_jax.core.runner import Runner
from qwen3_moe_jax.machine import processes
from qwen3_moe_jax.machine.headroom import available_main_memory
from qwen3_moe_jax.machine.resident import ResidentPeak
from qwen3_moe_jax.machine.threads import one_thread_per_product, shares_the_lock
from qwen3_moe_jax.parity.ahead import Ahead
from qwen3_moe_jax.parity.clauses import (
    BACKEND_CHECKS,
    FAILED,
    FILE_CHECKS,
    PASSED,
    TEXT_CLAUSES,
    Finding,
)
from qwen3_moe_jax.parity.contract import Clause, load_contract
from qwen3_moe_jax.parity.crew import Crew
from qwen3_moe_jax.parity.evidence import Evidence, Lazily, Oracle, is_small
from qwen3_moe_jax.parity.receipt import RECEIPT_FORMAT, check_receipt
from qwen3_moe_jax.parity.recorded import parity_text
from qwen3_moe_jax.text.tokenizer import Tokenizer

TEXT_TOKENS = 2048
MIN_TOKENS = 64
"""Shorter texts have no several chunks, and no tokens after those that are written."""

JUDGE_BYTES = 500 << 20
"""One dequantized layer's tensors and the judge's copies, beside logits."""

WORKER_BYTES = 100 << 20
"""What each further worker holds of a matrix that is judged, in float64."""

RUNS_AT_A_TIME = 12
"""Of a large model on a device. Most of them wait: for a program, or for the reference."""

TEXT_RUNS = 3
"""Runs of the text, with its logits, that are made side by side: free, replayed and a second time."""

TIMED_CLAUSES = frozenset({"SPEED-001"})
"""Clauses that measure time, with nothing else running."""

VERSIONS_OF = ("jax", "jaxlib", "flax", "numpy", "wgpu")

Progress = Callable[[Finding], None]
Begins = Callable[[str, str], None]


@dataclass(frozen=True)
class Report:
    """The verdict on a file and its backends.

    Attributes:
      facts: file, machine, versions and backends, as a receipt has them.
      findings: in the order in which they were made.
    """

    facts: Mapping[str, Any]
    findings: tuple[Finding, ...]

    @property
    def passed(self) -> bool:
        """Whether no clause failed and at least one of each backend passed."""
        subjects = {b["label"] for b in self.facts["backends"]}
        proven = {f.subject for f in self.findings if f.verdict == PASSED}
        return not self.failures and subjects <= proven

    @property
    def failures(self) -> tuple[Finding, ...]:
        """The clauses that failed."""
        return tuple(f for f in self.findings if f.verdict == FAILED)

    def receipt(self) -> dict[str, Any]:
        """Plain data for a JSON file, checked against the receipt's schema.

        Raises:
          ValueError: the report does not fit the schema (a bug).
        """
        data = {
            **self.facts,
            "verdict": "passed" if self.passed else "failed",
            "findings": [_plain(dataclasses.asdict(f)) for f in self.findings],
        }
        check_receipt(data)
        return data

    def to_json(self) -> str:
        """The receipt as text."""
        return json.dumps(self.receipt(), indent=1, allow_nan=False)

    def summary(self) -> str:
        """The verdict in one line."""
        counts = {v: sum(f.verdict == v for f in self.findings) for v in (PASSED, FAILED)}
        if self.passed:
            labels = ", ".join(b["label"] for b in self.facts["backends"])
            return (
                f"PASSED: {labels} compute{'s' if labels.count(',') == 0 else ''} this file rightly on this "
                f"machine ({counts[PASSED]} checks, {self.facts['seconds']:.0f} s)"
            )
        if not self.failures:
            return "FAILED: a backend passed no clause at all"
        first = self.failures[0]
        count = f"{counts[FAILED]} of {len(self.findings)} checks"
        return f"FAILED: {count}, first {first.clause} of {first.subject}"


@dataclass(frozen=True)
class Unloaded:
    """A backend that verify loads itself, when its turn comes, and closes after it.

    Attributes:
      load: gives the loaded backend.
      max_context: tokens that its cache is going to hold.
      has_own_memory: whether its weights are going to lie in the memory of a device, not in the main memory.
    """

    load: Callable[[], Runner]
    max_context: int
    has_own_memory: bool = False


def verify(
    source: ModelSource,
    runners: Sequence[Runner | Unloaded],
    *,
    text_tokens: int = TEXT_TOKENS,
    clauses: Sequence[str] | None = None,
    progress: Progress | None = None,
    begins: Begins | None = None,
) -> Report:
    """Runs the contract's clauses.

    Backends of a small model are loaded together and their runs made side by side.
    Of a large one a single backend is in memory at any time, if they are given
    ``Unloaded``, and the reference reads its tensors as it needs them; runs are made
    side by side where a device has the weights in its own memory.

    Args:
      source: the open file or checkpoint that every runner is loaded from.
      runners: backends to judge.
      text_tokens: length of the text; less where a context does not hold it.
      clauses: ids of the clauses to check; None is all.
      progress: told each finding as it is made.
      begins: told what is turned to, a clause or what clauses need, and of which subject.

    Raises:
      ValueError: no runner, an unknown clause, or a text or context below MIN_TOKENS.
      MemoryPlanError: a backend does not fit, or leaves no room for the text's logits.
    """
    check_number("text_tokens", text_tokens)
    contract = load_contract()
    unknown = set(clauses or ()) - contract.clauses.keys()
    if unknown or not runners:
        raise OptionError(
            f"unknown clauses: {', '.join(sorted(unknown))}" if unknown else "no backend to verify"
        )
    wanted = [c for c in contract.clauses if clauses is None or c in clauses]
    began = time.perf_counter()
    room = min(r.max_context for r in runners)
    if room < MIN_TOKENS:
        raise ValueError(f"a context of {room} tokens is too short to verify: give at least {MIN_TOKENS}")
    if text_tokens < MIN_TOKENS:
        raise ValueError(f"a text of {text_tokens} tokens is too short to verify: give at least {MIN_TOKENS}")
    findings: list[Finding] = []
    backends: list[dict] = []

    def found(finding: Finding) -> None:
        findings.append(finding)
        if progress:
            progress(finding)

    begins = begins or (lambda what, subject: None)

    in_file = [id for id in wanted if id in FILE_CHECKS]
    has_own_memory = all(isinstance(runner, Unloaded) and runner.has_own_memory for runner in runners)

    with ExitStack() as stack:
        crew = Crew.of(source) if has_own_memory and not is_small(source) else None
        if crew is not None:
            stack.callback(crew.close)
        oracle = Oracle(source, _text_ids(source, min(text_tokens, room)), crew)
        stack.enter_context(one_thread_per_product())
        if oracle.is_small:
            ahead = stack.enter_context(Ahead.open(os.cpu_count() or 1))
            subjects = _all_at_once(stack, oracle, runners, ahead, wanted)
        else:
            stack.enter_context(shares_the_lock())
            ahead = stack.enter_context(Ahead.open(RUNS_AT_A_TIME))
            subjects = _one_by_one(oracle, runners, ahead, wanted, begins)
        of_file = {
            id: Lazily(partial(_checked, FILE_CHECKS[id], contract.clauses[id], oracle, "file"))
            for id in in_file
        }
        if has_own_memory and not oracle.is_small:  # beside the load
            ahead.start(of_file.values())
            subjects = _after_the_first(subjects)

        def tell(id: str, subject: str, check: Callable[[], Finding]) -> None:
            begins(id, subject)
            at = time.perf_counter()
            if id in TIMED_CLAUSES:
                ahead.wait()
            finding = check()
            found(dataclasses.replace(finding, seconds=round(time.perf_counter() - at, 3)))

        for id, check in of_file.items():
            tell(id, "file", check)
        for evidence in subjects:
            facts = {"label": evidence.label, "load_seconds": round(evidence.load_seconds, 3)}
            backends.append({**facts, **_plain(evidence.facts)})
            for id, check in BACKEND_CHECKS.items():
                if id in wanted:
                    tell(
                        id,
                        evidence.label,
                        partial(_checked, check, contract.clauses[id], evidence, evidence.label),
                    )
        begins("SHA-256", "file")
        facts = _facts(oracle, backends, contract.version, began)
    return Report(facts, tuple(findings))


def _after_the_first(subjects: Iterable[Evidence]) -> Iterator[Evidence]:
    """The same, the first of them made now."""
    rest = iter(subjects)
    return chain([next(rest)], rest)


def _all_at_once(
    stack: ExitStack,
    oracle: Oracle,
    runners: Sequence[Runner | Unloaded],
    ahead: Ahead,
    wanted: Sequence[str],
) -> list[Evidence]:
    """Every backend loaded, to be closed with ``stack``, and the runs begun of those that allow it."""
    subjects = []
    for runner in runners:
        began = time.perf_counter()
        loaded = stack.enter_context(closing(runner.load())) if isinstance(runner, Unloaded) else runner
        subjects.append(Evidence(oracle, loaded, load_seconds=time.perf_counter() - began))
    for evidence in subjects:
        if _takes_threads(evidence.runner):
            ahead.start(evidence.runs(wanted))
    return subjects


def _one_by_one(
    oracle: Oracle,
    runners: Sequence[Runner | Unloaded],
    ahead: Ahead,
    wanted: Sequence[str],
    begins: Begins,
) -> Iterator[Evidence]:
    """One backend after the other; those that are loaded here are closed before the next is.

    Raises:
      MemoryPlanError: there is no room for a backend, or beside it for the text's logits.
    """
    with_text = not TEXT_CLAUSES.isdisjoint(wanted)
    beside = all(isinstance(runner, Unloaded) and runner.has_own_memory for runner in runners)
    if with_text and beside:
        ahead.start([lambda: oracle.text])
    elif with_text:
        begins("the text", "reference")
        _ = oracle.text  # before a backend is in memory
    for runner in runners:
        if not isinstance(runner, Unloaded):
            yield Evidence(oracle, runner)
            continue
        resident = ResidentPeak.start()
        begins("loading", "backend")
        began = time.perf_counter()
        with closing(runner.load()) as loaded:
            if with_text:
                check_room_for_logits(oracle, available_main_memory())
            evidence = Evidence(oracle, loaded, resident, time.perf_counter() - began)
            evidence.expect(wanted)
            free = available_main_memory()
            has_room = free is None or free >= needed_for_logits(oracle, TEXT_RUNS)
            if _takes_threads(loaded) and runner.has_own_memory and has_room:
                runs = evidence.runs(wanted)
                # memory is measured before anything else is there
                first = (lambda e=evidence: e.memory) if "VRAM-001" in wanted else (lambda: None)
                ahead.start_after(first, [*runs, lambda: oracle.sha256])
            yield evidence
            ahead.wait()


def _takes_threads(runner: Runner) -> bool:
    """Whether runs of a backend may be made at the same time."""
    return runner.capabilities.concurrent and processes.count() == 1  # which have to do the same in turn


def needed_for_logits(oracle: Oracle, runs: int = 1) -> int:
    """Bytes of main memory that so many runs of the text at once take beside the loaded model.

    Logits of a window are there twice for a moment: in pieces, and joined.
    """
    return 2 * runs * oracle.logits_nbytes + JUDGE_BYTES + WORKER_BYTES * (oracle.workers.count - 1)


def check_room_for_logits(oracle: Oracle, free: int | None) -> None:
    """Raises MemoryPlanError unless a backend's logits of one window fit what is free."""
    needed = needed_for_logits(oracle)
    if free is None or free >= needed:
        return
    raise MemoryPlanError(
        f"verify needs {needed / 1e9:.2f} GB of main memory for logits beside the loaded model, and "
        f"{free / 1e9:.2f} GB are free: --clause STAGES-001 needs none of it"
    )


def _text_ids(source: ModelSource, count: int) -> list[int]:
    tokenizer = Tokenizer(source.metadata, vocab_size=source.config.vocab_size)
    return tokenizer.encode(parity_text())[:count]


def _checked(check: Callable[[Clause, Any], Finding], clause: Clause, subject: Any, label: str) -> Finding:
    """A check whose backend raises has failed; the rest of the contract is still run."""
    try:
        return check(clause, subject)
    except Exception as error:  # a backend may raise anything: it is this clause's failure and no other's
        note = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        return Finding(clause.id, label, FAILED, None, None, note)


def _facts(oracle: Oracle, backends: list[dict], contract_version: int, began: float) -> dict[str, Any]:
    """Everything about a run that is no finding."""
    source = oracle.source
    return {
        "format": RECEIPT_FORMAT,
        "created": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "file": {
            "name": source.path.name,
            "sha256": oracle.sha256,
            "identity": source.identity,
            "nbytes": source.nbytes,
            "model": str(source.metadata.get("general.name", "")),
            "types": sorted({t.name for t in source.types.values()}),
        },
        "code_version": code_version(),
        "contract_version": contract_version,
        "text_tokens": len(oracle.text_ids),
        "machine": {"system": platform.platform(), "processor": platform.machine()},
        "versions": {"python": sys.version.split()[0], **_versions()},
        "backends": backends,
        "seconds": time.perf_counter() - began,
    }


def _versions() -> dict[str, str]:
    found = {}
    for name in VERSIONS_OF:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def _plain(value: Any) -> Any:
    """JSON data: NumPy scalars become numbers, and numbers that are not finite become their names."""
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [_plain(v) for v in value]
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, float) and not np.isfinite(value):
        return str(value)
    return value if isinstance(value, str | int | float | bool | None) else str(value)
