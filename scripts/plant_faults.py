"""Plants each of ten faults in each backend and sees ``verify`` fail and ``bisect`` name it.

    python scripts/plant_faults.py --backend reference --backend jax --json receipt.json

Ends with one line of JSON: faults caught and named of those planted, per backend.
"""

import argparse
import json
import platform
import sys
import time
from pathlib import Path

from convert.model_source import ModelSource, open_model
from qwen3_moe_jax import loader
from qwen3_moe_jax.parity.bisect import LONG_TOKENS, bisect
from qwen3_moe_jax.parity.code_version import code_version
from qwen3_moe_jax.parity.faults import FAULTS, Fault, plant
from qwen3_moe_jax.parity.recorded import parity_text
from qwen3_moe_jax.parity.verify import verify
from qwen3_moe_jax.tokenizer import Tokenizer

BACKENDS = ("reference", "jax", "jax:bfloat16", "wgpu")


def try_fault(
    source: ModelSource, backend: str, fault: Fault, token_ids: list[int], text_tokens: int
) -> dict:
    """Plants one fault; says whether verify failed, by which clauses, and whether bisect named it.

    Without ``text_tokens`` only bisect is tried.
    """
    name, _, dtype = backend.partition(":")

    def make(lying: ModelSource):
        return loader.make_runner(lying, name, max_context=1024, dtype=dtype or "float32")

    row: dict = {"fault": fault.name}
    if text_tokens:
        report = verify(source, [plant(fault, source, make, shaders=name == "wgpu")], text_tokens=text_tokens)
        row["verify_failed"] = not report.passed
        row["clauses"] = sorted({f.clause for f in report.failures})
    found = bisect(source, plant(fault, source, make, shaders=name == "wgpu"), token_ids)
    row["bisect_named"] = found is not None and (
        (found.stage, found.layer, found.judgement.tensor) == (fault.stage, fault.layer, fault.tensor)
        and found.cause.expert == fault.expert
        and fault.cause in found.cause.words
    )
    row["bisect"] = None if found is None else found.to_json()
    return row


def forget_programs() -> None:
    """Frees what JAX has compiled: every fault is another set of programs, and their memory maps run out."""
    if "jax" in sys.modules:
        sys.modules["jax"].clear_caches()


def try_backend(source: ModelSource, backend: str, token_ids: list[int], text_tokens: int) -> dict:
    """All ten faults in one backend."""
    rows = []
    for fault in FAULTS.values():
        began = time.perf_counter()
        row = try_fault(source, backend, fault, token_ids, text_tokens)
        rows.append(row)
        forget_programs()
        judged = {True: "failed", False: "PASSED", None: "not tried"}[row.get("verify_failed")]
        named = "named it" if row["bisect_named"] else "DID NOT"
        seconds = time.perf_counter() - began
        print(f"{backend:14} {fault.name:20} verify {judged}, bisect {named} ({seconds:.0f} s)", flush=True)
    return {
        "backend": backend,
        "planted": len(rows),
        "verify_failed": sum(r["verify_failed"] for r in rows) if text_tokens else None,
        "bisect_named": sum(r["bisect_named"] for r in rows),
        "faults": rows,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--backend", action="append", choices=BACKENDS, help="default: reference and jax")
    parser.add_argument(
        "--tokens", type=int, default=640, help="length of verify's text; 0 tries bisect alone"
    )
    parser.add_argument("--json", metavar="FILE", help="write all results here")
    args = parser.parse_args()
    with open_model(loader.embedded_model()) as source:
        tokenizer = Tokenizer(source.metadata, vocab_size=source.config.vocab_size)
        token_ids = tokenizer.encode(parity_text())[:LONG_TOKENS]
        backends = args.backend or ["reference", "jax"]
        results = [try_backend(source, b, token_ids, args.tokens) for b in backends]
    facts = {"code_version": code_version(), "machine": platform.platform(), "results": results}
    if args.json:
        Path(args.json).write_text(json.dumps(facts, indent=1) + "\n")
    counts = ("backend", "planted", "verify_failed", "bisect_named")
    print(json.dumps([{k: r[k] for k in counts} for r in results]))
    all_found = all(
        r["bisect_named"] == r["planted"] and r["verify_failed"] in (r["planted"], None) for r in results
    )
    return 0 if all_found else 1


if __name__ == "__main__":
    raise SystemExit(main())
