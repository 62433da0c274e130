"""Each set of kernels forced on one GPU, in one run: checked, timed, with a receipt for each stage.

    python -m scripts.measure_paths --out results [--model FILE] [--kernels portable xla] [--budget 1700]

For every set: ``verify`` of the full-size file, decoding as a user runs it (1 and 8 sequences, 1 at a depth
of 4,096), and prompts of 512, 2,048 and 32 x 512 tokens. Sets are compared within one run on one card. What
the card does not run is left out by name. Receipts are OUT/SET-STAGE.json, as ``measure_gpu`` writes them.
"""

import argparse
import sys

from qwen3_moe_jax.machine.kernels import KERNELS, installed_jax, reason_against
from qwen3_moe_jax.machine.nvidia import nvidia_gpus
from scripts.measure_gpu import MODEL, RECEIPT, Stage, add_arguments, measure

WORK = ("decode", "prefill", "prefill-many", "verify")


def stages_of(kernels: str) -> list[Stage]:
    """The stages of one set of kernels, the cheapest first."""
    force = ("--kernels", kernels)
    prefill = ("-m", "scripts.bench_prefill", *force)
    verify = ("-m", "qwen3_moe_jax.cli", "verify", "-m", MODEL, "--backend", "jax:bfloat16", *force)
    rows = ("--stages", "rows", "--rows", "1:0", "1:4096", "8:0")
    work = {
        "decode": (("-m", "scripts.bench_decode", MODEL, *force, *rows), 300),
        "prefill": ((*prefill, "--tokens", "512", "2048"), 180),
        "prefill-many": ((*prefill, "--tokens", "512", "--sequences", "32"), 180),
        "verify": ((*verify, "--tokens", "64", "--receipt", RECEIPT), 400),
    }
    shows = "of the full-size file"
    return [Stage(f"{kernels}-{name}", f"{name} {shows}", *work[name]) for name in WORK]


def left_out(names: list[str]) -> dict[str, str]:
    """The sets that the first card does not run, with the reason."""
    capability = next((gpu.capability for gpu in nvidia_gpus()), "")
    reasons = {name: reason_against(name, capability, installed_jax()) for name in names}
    return {name: reason for name, reason in reasons.items() if reason}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kernels", nargs="+", choices=KERNELS, default=list(KERNELS))
    add_arguments(parser, [stage.name for kernels in KERNELS for stage in stages_of(kernels)])
    args = parser.parse_args()
    absent = left_out(args.kernels)
    for name, reason in absent.items():
        print(f"{name} is left out: {reason}")
    stages = [stage for name in args.kernels if name not in absent for stage in stages_of(name)]
    chosen = [stage for stage in stages if stage.name in args.stages]
    return measure(chosen, args.model, args.out, args.budget)


if __name__ == "__main__":
    sys.exit(main())
