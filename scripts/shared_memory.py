"""Prints the shared memory that a block of the decode kernel takes, bytes by name, against each card's limit.

python -m scripts.shared_memory [--preset NAME] [--kernels portable]
"""

import argparse
import json

from qwen3_moe_jax.convert.config import PRESETS
from qwen3_moe_jax.kernels_pallas.decode_step import api
from qwen3_moe_jax.kernels_pallas.decode_step.shared_memory import shared_memory_budget


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--preset", default="Qwen3-30B-A3B", choices=sorted(PRESETS))
    parser.add_argument("--kernels", default="hopper", choices=("hopper", "portable"))
    parser.add_argument("--blocks", type=int, default=132)
    args = parser.parse_args()
    device = api.Device.of_cores(args.blocks, kernels=args.kernels)
    batches = (1, 2, 4, api.KERNEL_BATCH)
    budgets = [shared_memory_budget(api.shape_config(PRESETS[args.preset], n, device)) for n in batches]
    print(f"{'batch':22}" + "".join(f"{n:9}" for n in batches))
    for name in dict.fromkeys(name for budget in budgets for name in budget):
        print(f"{name:22}" + "".join(f"{budget.get(name, 0):9}" for budget in budgets))
    totals = [sum(budget.values()) for budget in budgets]
    print(f"{'bytes per block':22}" + "".join(f"{total:9}" for total in totals))
    print(json.dumps({"preset": args.preset, "bytes": dict(zip(batches, totals, strict=True))}))


if __name__ == "__main__":
    main()
