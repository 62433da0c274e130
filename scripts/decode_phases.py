"""Where the decode kernel's time goes, phase by phase, from Nsight Compute's samples of each instruction.

On the GPU, a kernel of 6 layers, its sixth launch:

    ncu --clock-control none -k regex:qwen3_moe_decode --launch-skip 5 --launch-count 1 \\
        --section SourceCounters --section SpeedOfLight -o REPORT \\
        python -m scripts.profile_decode --check --speed 8:0 --layers 6 --vocab 8192
    ncu --import REPORT.ncu-rep --page details | grep Duration
    ncu --import REPORT.ncu-rep --page source --csv --print-source sass > REPORT.csv
    python -m scripts.decode_phases REPORT.csv --us DURATION --layers 6

All warps of the persistent kernel are there from its start to its end, so the share of samples that lie in a
phase's instructions is the share of time that it takes. A phase ends where its blocks signal (``REDG``), and
the wait for the phase before it ends where memory is acquired (``CCTL.IVALL``); the warps that do not poll
wait at the barrier behind it. Nothing is added to the kernel, unlike by a trace.

Prints one line per phase: microseconds per layer, how much of that is waiting for the other blocks, and what
warps wait for in the rest. The last line is JSON.
"""

import argparse
import csv
import json
import sys
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

BATCH_1 = ("norm, q k v", "attention", "join splits", "o", "router", "top-k, gate, up", "down", "lm_head")
BATCHES = ("norm", "q k v", *BATCH_1[1:-1], "norm", "lm_head")
END_OF_LAYER = "down"
"""What comes after it runs once per token."""
SOURCE, SAMPLES, STALL = "Source", "# Samples", "stall_"

DEFERRED = 48
"""Behind acquired memory comes a barrier, counted at the next instruction that needs it: within so many."""


@dataclass
class Phase:
    """Samples of one phase: ``waiting`` for other blocks, and ``reasons`` of the rest."""

    waiting: int = 0
    reasons: Counter = field(default_factory=Counter)

    @property
    def samples(self) -> int:
        return self.waiting + self.reasons.total()


def number(text: str) -> int:
    return int(text) if text.isdigit() else 0


def read(path: Path) -> list[dict[str, str]]:
    """Ncu's source page: a line that names the kernel, the columns' names, a row an instruction."""
    try:
        rows = list(csv.reader(path.read_text().splitlines()))
    except OSError as error:
        sys.exit(f"{path}: {error.strerror}")
    start = next((i for i, row in enumerate(rows) if SOURCE in row and SAMPLES in row), None)
    if start is None or start + 1 == len(rows):
        sys.exit(f"{path}: no instructions; export them by 'ncu --page source --csv --print-source sass'")
    return [dict(zip(rows[start], row, strict=False)) for row in rows[start + 1 :]]


def phases(instructions: list[dict[str, str]]) -> list[Phase]:
    """Phases in the order of the code; what follows the last signal belongs to the last."""
    reasons = [name for name in instructions[0] if name.startswith(STALL) and "(" not in name]
    found, here, polling, deferred = [], Phase(), False, 0
    for row in instructions:
        code = row[SOURCE]
        acquired = "CCTL.IVALL" in code
        polling = not acquired and (polling or ("LDG" in code and "STRONG" in code))
        deferred = DEFERRED if acquired else deferred - 1
        counts = Counter({name[len(STALL) :]: number(row[name]) for name in reasons})
        if polling:
            here.waiting += counts.total()
        else:
            if deferred > 0:
                here.waiting += counts.pop("barrier", 0)
            here.reasons.update(counts)
        if "REDG" in code:
            found.append(here)
            here = Phase()
    if not found:
        sys.exit("no instruction signals other blocks (REDG): is this the decode kernel?")
    found[-1].waiting += here.waiting
    found[-1].reasons.update(here.reasons)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("csv", type=Path)
    parser.add_argument("--us", type=float, required=True, help="the launch's duration, microseconds")
    parser.add_argument("--layers", type=int, required=True)
    args = parser.parse_args()
    found = phases(read(args.csv))
    names = next((n for n in (BATCH_1, BATCHES) if len(n) == len(found)), None)
    if names is None:
        sys.exit(f"{args.csv}: {len(found)} phases; the kernel has {len(BATCH_1)}, in batches {len(BATCHES)}")
    total = sum(phase.samples for phase in found)
    out = []
    for i, (name, phase) in enumerate(zip(names, found, strict=True)):
        once = i > names.index(END_OF_LAYER)
        each = args.us / total / (1 if once else args.layers)
        common = {reason: round(n * each, 2) for reason, n in phase.reasons.most_common(4)}
        row = {"phase": name, "per": "token" if once else "layer", "us": round(phase.samples * each, 2)}
        row |= {"us_waiting": round(phase.waiting * each, 2), "reasons_us": common}
        out.append(row)
        print(
            f"{name:16} {row['us']:7.2f} us a {row['per']}, {row['us_waiting']:6.2f} of it waiting; {common}"
        )
    layer = sum(row["us"] for row in out if row["per"] == "layer")
    print(json.dumps({"us_per_layer": round(layer, 2), "samples": total, "phases": out}))


if __name__ == "__main__":
    main()
