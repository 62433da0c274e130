"""Everything that this project claims of a GPU, measured in one go, unattended.

Each stage is a command in a process of its own with a time limit: one that hangs is made to say where
(its Python stacks), ended, and does not take the others with it. Output goes to the terminal as it comes
and to OUT/<stage>.log; a stage whose last line is JSON leaves a receipt, OUT/<stage>.json, with the
command, the commit, the versions and the device. The full-size file is made of random weights when none is
given. Cheap stages that tell most come first, so that --budget, the seconds in all, cuts the others.

    python -m scripts.measure_gpu --out results [--model FILE] [--stages kernels decode] [--budget 1500]
"""

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import TextIO

from qwen3_moe_jax.machine.child_environment import child_environment
from qwen3_moe_jax.machine.jax_devices import PLATFORMS_VARIABLE, PREALLOCATE_VARIABLE
from scripts import ROOT

MODEL = "{model}"
"""Stands for the full-size file in a stage's command."""

RECEIPT = "{receipt}"
"""Stands for OUT/<stage>.json where a command writes its own."""

GRACE_SECONDS = 5
"""Between the signal that prints a hanging process' stacks and its end."""


@dataclass(frozen=True)
class Stage:
    """One measurement.

    Attributes:
      name: of its log and receipt.
      shows: what it proves, for the table.
      command: arguments after ``python``; MODEL where the full-size file belongs.
      seconds: its time limit.
    """

    name: str
    shows: str
    command: tuple[str, ...]
    seconds: int


STAGES = (
    Stage("doctor", "what this machine can run", ("-m", "qwen3_moe_jax.cli", "doctor"), 60),
    Stage(
        "kernels",
        "every kernel but the decode step against float64",
        (
            "-m",
            "pytest",
            "-q",
            "-n",
            "8",
            "tests/kernels/test_ops_sm90.py",
            "tests/kernels/test_decode_layers.py",
            "tests/kernels/test_top_k.py",
            "-k",
            "TestHopper or on_a_gpu",
        ),
        600,
    ),
    Stage(
        "decode-kernel",
        "the decode step alone: right, the same bits, its speed",
        (
            "-m",
            "scripts.profile_decode",
            "--check",
            "1:300",
            "8:200",
            "--speed",
            "1:0",
            "8:0",
        ),
        400,
    ),
    Stage(
        "verify-embedded",
        "the parity contract on the embedded model",
        ("-m", "qwen3_moe_jax.cli", "verify", "--backend", "jax:bfloat16", "--receipt", RECEIPT),
        240,
    ),
    Stage(
        "decode",
        "a file as a user runs it: decode, batches, cold start, memory",
        ("-m", "scripts.bench_decode", MODEL, "--sha256"),
        600,
    ),
    Stage(
        "prefill",
        "prompts, one and many",
        ("-m", "scripts.bench_prefill", "--tokens", "512", "2048", "32768"),
        240,
    ),
    Stage(
        "prefill-many",
        "32 prompts of 512 tokens",
        ("-m", "scripts.bench_prefill", "--tokens", "512", "--sequences", "32"),
        180,
    ),
    Stage(
        "batch-decode",
        "32 and 64 sequences at the depth of 512 tokens",
        ("-m", "scripts.bench_batch", "--work", "decode", "--random-cache", "--sequences", "32", "64"),
        180,
    ),
    Stage(
        "batch",
        "32 and 64 sequences, mixed steps, skewed routing",
        ("-m", "scripts.bench_batch", "--sequences", "32", "64"),
        400,
    ),
    Stage(
        "ops",
        "the prefill kernels alone",
        (
            "-m",
            "scripts.bench_gpu_ops",
        ),
        400,
    ),
    Stage(
        "verify-full-size",
        "the parity contract on the full-size file",
        (
            "-m",
            "qwen3_moe_jax.cli",
            "verify",
            "-m",
            MODEL,
            "--backend",
            "jax:bfloat16",
            "--tokens",
            "64",
            "--receipt",
            RECEIPT,
        ),
        600,
    ),
    Stage(
        "perplexity",
        "how well the embedded model expects a text, to hold against the CPU's figure",
        (
            "-m",
            "qwen3_moe_jax.cli",
            "perplexity",
            "tests/data/perplexity-text.txt",
            "--backend",
            "jax",
            "--stride",
            "512",
            "--json",
        ),
        180,
    ),
    Stage(
        "bench",
        "a user's table of the full-size file",
        ("-m", "qwen3_moe_jax.cli", "bench", "-m", MODEL, "--backend", "jax", "--json"),
        600,
    ),
)


def make_model(path: Path) -> None:
    """Writes the full-size file of random weights."""
    vocabulary = ROOT / "tests" / "data" / "ggml-vocab-qwen2.gguf"
    command = [sys.executable, "-m", "scripts.make_random_gguf", path, "--vocab", vocabulary]
    subprocess.run(list(map(str, command)), cwd=ROOT, check=True)


def run(stage: Stage, model: str, out: Path, seconds: float) -> tuple[str, float]:
    """Runs one stage; returns its verdict and how long it took."""
    places = {MODEL: model, RECEIPT: str(out / f"{stage.name}.json")}
    arguments = [places.get(part, part) for part in stage.command]
    command = [sys.executable, "-X", "faulthandler", "-u", *arguments]
    # Stages of several processes share the card's memory.
    defaults = {PLATFORMS_VARIABLE: "cuda,cpu", PREALLOCATE_VARIABLE: "false"}
    began = time.monotonic()
    lines: list[str] = []
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        env={**defaults, **child_environment()},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,
    )
    reader = threading.Thread(target=_follow, args=(process.stdout, out / f"{stage.name}.log", lines))
    reader.start()
    in_time = _wait(process, seconds)
    reader.join()
    took = time.monotonic() - began
    _keep_receipt(stage, arguments, lines, out)
    if not in_time:
        return f"hangs: ended after {seconds:.0f} s", took
    return "done" if process.returncode == 0 else f"failed with exit code {process.returncode}", took


def _follow(output: TextIO, log: Path, lines: list[str]) -> None:
    """Shows and keeps the output as it comes."""
    with log.open("w") as file:
        for line in output:
            print(line, end="", flush=True)
            file.write(line)
            file.flush()
            lines.append(line)


def _wait(process: subprocess.Popen, seconds: float) -> bool:
    """Waits for the process; one that takes too long prints its stacks and is ended."""
    for patience, last_word in ((seconds, signal.SIGABRT), (GRACE_SECONDS, signal.SIGKILL)):
        try:
            process.wait(patience)
            break
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, last_word)  # SIGABRT: faulthandler's turn
    in_time = process.returncode is not None and process.returncode != -signal.SIGABRT
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)  # children that it left
    process.wait()
    return in_time


def _keep_receipt(stage: Stage, arguments: list[str], lines: list[str], out: Path) -> None:
    """Writes the stage's JSON line with where it comes from."""
    last = next((line for line in reversed(lines) if line.strip()), "")
    try:
        figures = json.loads(last)
    except json.JSONDecodeError:
        return
    receipt = {
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "command": " ".join(["python", *arguments]),
        "commit": _output("git", "rev-parse", "--short", "HEAD"),
        "device": _device(),
        "versions": {name: _version(name) for name in ("jax", "jaxlib", "flax", "numpy")},
        "figures": figures,
    }
    (out / f"{stage.name}.json").write_text(json.dumps(receipt, indent=1) + "\n")


def _output(*command: str) -> str:
    """What a command prints, or nothing where it does not exist."""
    try:
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False).stdout.strip()
    except FileNotFoundError:
        return ""


def _device() -> str:
    """Name and driver of the GPUs, or nothing."""
    return _output("nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader")


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return ""


def measure(stages: Sequence[Stage], model: Path | None, out: Path, seconds: float) -> int:
    """Runs stages within a time; 0 if all are done. Makes the full-size file where one needs it."""
    if not _device():
        print("no NVIDIA GPU here (nvidia-smi names none): nothing to measure", file=sys.stderr)
        return 1
    out.mkdir(parents=True, exist_ok=True)
    end = time.monotonic() + seconds
    model = model or out / "full-size.gguf"
    if any(MODEL in stage.command for stage in stages) and not model.exists():
        make_model(model)
    table = []
    for stage in stages:
        left = end - time.monotonic()
        print(f"== {stage.name}: {stage.shows}", flush=True)
        if left < min(stage.seconds, 30):
            table.append((stage, "not run: no time left", 0.0))
            continue
        table.append((stage, *run(stage, str(model), out, min(stage.seconds, left))))
    print(f"{'stage':<22} {'seconds':>7}  outcome")
    for stage, outcome, took in table:
        print(f"{stage.name:<22} {took:7.0f}  {outcome}")
    return 0 if all(outcome == "done" for _, outcome, _ in table) else 1


def add_arguments(parser: argparse.ArgumentParser, names: Sequence[str]) -> None:
    """Options of :func:`measure`."""
    parser.add_argument("--out", type=Path, default=Path("gpu-results"), help="folder of logs and receipts")
    parser.add_argument(
        "--model", type=Path, help="a full-size file; made of random weights if none is given"
    )
    parser.add_argument(
        "--stages", nargs="+", choices=names, default=names, metavar="STAGE", help=", ".join(names)
    )
    parser.add_argument(
        "--budget", type=float, default=float("inf"), metavar="SECONDS", help="for all stages"
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_arguments(parser, [stage.name for stage in STAGES])
    args = parser.parse_args()
    chosen = [stage for stage in STAGES if stage.name in args.stages]
    return measure(chosen, args.model, args.out, args.budget)


if __name__ == "__main__":
    sys.exit(main())
