"""Plants each of ten faults in each backend and sees ``verify`` fail and ``bisect`` name it.

    python -m scripts.plant_faults --json receipt.json

``verify`` is the command itself, with every clause and its full text: what is recorded is its exit code and
the clauses that failed. Each fault is written as soon as it was tried; ``--resume`` goes on after those of
the same code. Ends with one line of JSON: faults caught and named of those planted, per backend.
"""

import argparse
import io
import json
import platform
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from importlib import metadata
from pathlib import Path
from unittest import mock

from qwen3_moe_jax import cli, loader
from qwen3_moe_jax.convert.open_model import open_model
from qwen3_moe_jax.convert.source import ModelSource
from qwen3_moe_jax.core.code_version import code_version
from qwen3_moe_jax.core.runner import Runner
from qwen3_moe_jax.parity.bisect import LONG_TOKENS, bisect
from qwen3_moe_jax.parity.recorded import parity_text
from qwen3_moe_jax.parity.verify import TEXT_TOKENS
from qwen3_moe_jax.testing.fault_list import FAULTS, Fault
from qwen3_moe_jax.testing.faults import plant
from qwen3_moe_jax.text.tokenizer import Tokenizer
from scripts import ROOT

BACKENDS = ("reference", "jax", "jax:bfloat16", "wgpu")

VERSIONS_OF = ("jax", "jaxlib", "flax", "numpy", "wgpu")


def try_fault(
    source: ModelSource, backend: str, fault: Fault, token_ids: list[int], text_tokens: int
) -> dict:
    """Plants one fault; says whether verify failed, by which clauses, and whether bisect named it.

    Without ``text_tokens`` only bisect is tried.
    """
    name, _, dtype = backend.partition(":")
    true = loader.make_runner

    def faulty(lying: ModelSource, backend: str, **options) -> Runner:
        return plant(fault, lying, lambda s: true(s, backend, **options), shaders=backend == "wgpu")

    row: dict = {"fault": fault.name}
    if text_tokens:
        with mock.patch.object(loader, "make_runner", faulty):
            row |= run_verify(backend, text_tokens)
    found = bisect(source, faulty(source, name, max_context=1024, dtype=dtype or "float32"), token_ids)
    row["bisect_named"] = found is not None and (
        (found.stage, found.layer, found.judgement.tensor) == (fault.stage, fault.layer, fault.tensor)
        and found.cause.expert == fault.expert
        and fault.cause in found.cause.words
    )
    row["bisect"] = None if found is None else found.to_json()
    return row


def run_verify(backend: str, text_tokens: int) -> dict:
    """``qwen3-moe verify`` of one backend: its exit code, and the clauses that failed."""
    shown = io.StringIO()
    with redirect_stdout(shown), redirect_stderr(io.StringIO()):
        code = cli.main(["verify", "--backend", backend, "--tokens", str(text_tokens), "--json"])
    findings = json.loads(shown.getvalue())["findings"]
    failed = sorted({f["clause"] for f in findings if f["verdict"] == "failed"})
    return {"verify_exit_code": code, "verify_failed": code == 1 and bool(failed), "clauses": failed}


def forget_programs() -> None:
    """Frees what JAX has compiled: every fault is another set of programs, and their memory maps run out."""
    if "qwen3_moe_jax.jax_backend.programs" in sys.modules:
        sys.modules["qwen3_moe_jax.jax_backend.programs"].forget()


def try_backend(
    source: ModelSource,
    backend: str,
    token_ids: list[int],
    text_tokens: int,
    rows: list[dict],
    keep: Callable[[dict], None],
) -> dict:
    """All ten faults in one backend, but for those of ``rows``; ``keep`` is told the result after each."""
    tried = {row["fault"] for row in rows}
    for fault in FAULTS.values():
        if fault.name in tried:
            continue
        began = time.perf_counter()
        row = try_fault(source, backend, fault, token_ids, text_tokens)
        rows.append(row)
        forget_programs()
        judged = {True: "failed", False: "PASSED", None: "not tried"}[row.get("verify_failed")]
        named = "named it" if row["bisect_named"] else "DID NOT"
        seconds = time.perf_counter() - began
        print(f"{backend:14} {fault.name:20} verify {judged}, bisect {named} ({seconds:.0f} s)", flush=True)
        keep(counted(backend, rows, text_tokens))
    return counted(backend, rows, text_tokens)


def counted(backend: str, rows: list[dict], text_tokens: int) -> dict:
    """The rows of a backend, with how many faults were caught and named."""
    return {
        "backend": backend,
        "planted": len(rows),
        "verify_failed": sum(r["verify_failed"] for r in rows) if text_tokens else None,
        "bisect_named": sum(r["bisect_named"] for r in rows),
        "faults": rows,
    }


def commit() -> str:
    """Of this clone; "" outside one."""
    command = ["git", "rev-parse", "--short", "HEAD"]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False).stdout.strip()


def kept_before(path: str | None, facts: dict) -> dict[str, dict]:
    """Results by backend of an unfinished run with the same code, file and text."""
    before = json.loads(Path(path).read_text()) if path and Path(path).is_file() else {}
    same = all(before.get(name) == facts[name] for name in ("code_version", "file", "text_tokens"))
    return {result["backend"]: result for result in before["results"]} if same else {}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--backend", action="append", choices=BACKENDS, help="default: all but wgpu")
    parser.add_argument(
        "--tokens", type=int, default=TEXT_TOKENS, help="length of verify's text; 0 tries bisect alone"
    )
    parser.add_argument("--json", metavar="FILE", help="write all results here")
    parser.add_argument("--resume", action="store_true", help="go on with that file's results of this code")
    args = parser.parse_args()
    with open_model(loader.embedded_model()) as source:
        tokenizer = Tokenizer(source.metadata, vocab_size=source.config.vocab_size)
        token_ids = tokenizer.encode(parity_text())[:LONG_TOKENS]
        backends = args.backend or BACKENDS[:3]
        facts = {
            "date": time.strftime("%Y-%m-%d", time.gmtime()),
            "command": " ".join(["python", *sys.argv]),
            "file": {"name": source.path.name, "sha256": source.sha256()},
            "code_version": code_version(),
            "commit": commit(),
            "text_tokens": args.tokens,
            "machine": platform.platform(),
            "versions": {
                "python": platform.python_version(),
                **{n: metadata.version(n) for n in VERSIONS_OF},
            },
        }
        found = kept_before(args.json, facts) if args.resume else {}

        def keep(result: dict) -> None:
            found[result["backend"]] = result
            if args.json:
                Path(args.json).write_text(
                    json.dumps({**facts, "results": list(found.values())}, indent=1) + "\n"
                )

        for backend in backends:
            rows = found.get(backend, {}).get("faults", [])
            keep(try_backend(source, backend, token_ids, args.tokens, rows, keep))
        results = list(found.values())
    counts = ("backend", "planted", "verify_failed", "bisect_named")
    print(json.dumps([{k: r[k] for k in counts} for r in results]))
    all_found = all(
        r["bisect_named"] == r["planted"] and r["verify_failed"] in (r["planted"], None) for r in results
    )
    return 0 if all_found else 1


if __name__ == "__main__":
    raise SystemExit(main())
