"""``qwen3-moe doctor``: what this machine can run, and the one thing to do about each problem."""

import argparse
import dataclasses
import json

from qwen3_moe_jax import loader
from qwen3_moe_jax.convert.errors import ModelFileError
from qwen3_moe_jax.convert.model_source import open_model
from qwen3_moe_jax.machine import probe as machine
from qwen3_moe_jax.machine.memory import MemoryPlan
from qwen3_moe_jax.machine.probe import Finding, Machine
from qwen3_moe_jax.wgpu_backend.adapter import list_adapters

MARKS = {"ok": "ok     ", "note": "note   ", "problem": "PROBLEM"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("-m", "--model", help="also look at this .gguf file or packed checkpoint")
    parser.add_argument(
        "--context", type=int, default=loader.DEFAULT_CONTEXT, help="tokens to plan memory for"
    )
    parser.add_argument("--json", action="store_true", help="print the findings as JSON")


def run(args: argparse.Namespace) -> int:
    facts = machine.detect(list_adapters())
    findings = machine.diagnose(facts)
    findings += judge_model(args.model or loader.embedded_model(), args.context, facts)
    choice = loader.choose_backend()
    findings.append(Finding("ok", "backend", f"auto is {choice.backend}: {choice.reason}"))
    if args.json:
        print(json.dumps([dataclasses.asdict(f) for f in findings], indent=2))
    else:
        for finding in findings:
            print(f"{MARKS[finding.level]}  {finding.subject}: {finding.text}")
            if finding.advice:
                print(f"         -> {finding.advice}")
    return 1 if any(f.level == "problem" for f in findings) else 0


def judge_model(path, context: int, facts: Machine) -> list[Finding]:
    """The file's header, tensors and memory need; reads no weights."""
    try:
        with open_model(path) as source:
            kinds = ", ".join(sorted({t.name for t in source.types.values()}))
            what = f"{path}: {len(source.types)} tensors ({kinds}), {source.nbytes / 1e9:.2f} GB"
            plan = MemoryPlan.of(source, min(context, source.config.max_position_embeddings), itemsize=4)
            return [Finding("ok", "model", what), machine.judge_memory(facts, plan)]
    except ModelFileError as error:
        return [Finding("problem", "model", f"{path}: {error}", error.advice)]
