"""Prints the shared memory that a block of the decode kernel takes, bytes by name, against each card's limit.

    python -m scripts.shared_memory [--preset NAME] [--kernels portable]
    python -m scripts.shared_memory --cards [--receipt docs/receipts/kernel_sequences.json]

``--cards``: for each card of ``kernels_pallas/gpu/cards.toml``, how many sequences one portable kernel of it
takes, and what one more would need. Nothing is compiled, no GPU is needed.
"""

import argparse
import json
import time
from collections.abc import Iterator
from pathlib import Path

import jax

from qwen3_moe_jax.convert.config import PRESETS
from qwen3_moe_jax.kernels_pallas.decode_step import api
from qwen3_moe_jax.kernels_pallas.decode_step.shared_memory import shared_memory_budget
from qwen3_moe_jax.kernels_pallas.gpu import cards
from scripts._receipts import write_rows


def budgets(preset: str, kernels: str, blocks: int) -> None:
    """Bytes by name, for some batches."""
    device = api.Device.of_cores(blocks, kernels=kernels)
    batches = (1, 2, 4, api.KERNEL_BATCH)
    found = [shared_memory_budget(api.shape_config(PRESETS[preset], n, device)) for n in batches]
    print(f"{'batch':22}" + "".join(f"{n:9}" for n in batches))
    for name in dict.fromkeys(name for budget in found for name in budget):
        print(f"{name:22}" + "".join(f"{budget.get(name, 0):9}" for budget in found))
    totals = [sum(budget.values()) for budget in found]
    print(f"{'bytes per block':22}" + "".join(f"{total:9}" for total in totals))
    print(json.dumps({"preset": preset, "bytes": dict(zip(batches, totals, strict=True))}))


def of_cards(preset: str) -> Iterator[dict]:
    """A row per card: blocks, sequences of one kernel, its bytes, and those of one sequence more."""
    for known in cards.capabilities().values():
        for card, cores in known.multiprocessors.items():
            device = api.Device.of_cores(cores, kernels="portable", shared_memory=known.shared_memory)
            sequences = api.kernel_batch(PRESETS[preset], device)
            shapes = [api.shape_config(PRESETS[preset], n, device) for n in (sequences, sequences + 1)]
            here, more = (sum(shared_memory_budget(shape).values()) for shape in shapes)
            yield {
                "card": card, "capability": known.version, "multiprocessors": cores,
                "blocks": device.blocks, "sequences": sequences, "down_parts": shapes[0].down_parts,
                "down_passes": shapes[0].down_passes, "shared_memory": here, "limit": known.shared_memory,
                "one_more": more,
            }  # fmt: skip


def show_cards(preset: str, receipt: Path | None) -> None:
    """Prints a line per card, and writes the receipt."""
    rows = list(of_cards(preset))
    for row in rows:
        print(
            f"{row['capability']:5} {row['card']:18} {row['blocks']:4} blocks {row['sequences']:2} sequences "
            f"{row['shared_memory']:7} of {row['limit']} bytes (one more: {row['one_more']}); "
            f"{row['down_parts']} parts of down in {row['down_passes']} passes"
        )
    print(json.dumps({"preset": preset, "cards": rows}))
    if receipt:
        facts = {
            "what": "sequences of one portable decode kernel by card, as a block's shared memory holds them: "
            "worked out from shapes, nothing was run",
            "date": time.strftime("%Y-%m-%d", time.gmtime()),
            "device": "no GPU",
            "command": f"python -m scripts.shared_memory --cards --receipt {receipt}",
            "versions": {"jax": jax.__version__},
            "preset": preset,
        }
        write_rows(receipt, facts, "cards", rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--preset", default="Qwen3-30B-A3B", choices=sorted(PRESETS))
    parser.add_argument("--kernels", default="hopper", choices=("hopper", "portable"))
    parser.add_argument("--blocks", type=int, default=132)
    parser.add_argument("--cards", action="store_true", help="how many sequences a kernel of each card takes")
    parser.add_argument("--receipt", type=Path, help="with --cards: file to write")
    args = parser.parse_args()
    if args.cards:
        show_cards(args.preset, args.receipt)
    else:
        budgets(args.preset, args.kernels, args.blocks)


if __name__ == "__main__":
    main()
