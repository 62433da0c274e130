"""The tables of what is known of cards that are not here: kernels that were compiled, and shared memory."""

from itertools import groupby

from scripts._receipts import receipt, table

NAMES = {
    "decode_step hopper": "decode, Hopper's",
    "decode_step hopper int8": "decode, int8 cache, Hopper's",
    "decode_step portable": "decode, portable",
    "decode_step portable int8": "decode, int8 cache, portable",
    "grouped_matmul hopper IQ4_XS swiglu": "product with SwiGLU, IQ4_XS, Hopper's",
    "grouped_matmul portable IQ4_XS swiglu": "product with SwiGLU, IQ4_XS, portable",
    "grouped_matmul hopper Q4_K swiglu": "product with SwiGLU, Q4_K, Hopper's",
    "grouped_matmul portable Q4_K swiglu": "product with SwiGLU, Q4_K, portable",
    "grouped_matmul hopper Q6_K": "product, Q6_K, Hopper's",
    "grouped_matmul portable Q6_K": "product, Q6_K, portable",
    "attention hopper": "attention, Hopper's",
    "attention portable": "attention, portable",
}


def compiled_kernels() -> str:
    """Registers, spilled bytes and shared memory of each kernel and target."""
    kernels = receipt("compiled_kernels")["kernels"]
    return table(
        "target | kernel | sequences, or rows of a tile | registers | bytes spilled | shared memory",
        [_row(row) for row in sorted(kernels, key=_order)],
    )


def _order(row: dict) -> tuple:
    return int(row["target"].strip("sm_a")), list(NAMES).index(row["kernel"]), row["batch"]


def _row(row: dict) -> tuple:
    start = (f"{row['target']} ({row['card']})", NAMES[row["kernel"]], row["batch"])
    if "skipped" in row:
        return (*start, row["skipped"], "", "")
    return (*start, row["registers"], row["spilled"], f"{row['shared_memory']:,} of {row['limit']:,}")


def kernel_sequences() -> str:
    """Sequences of one portable decode kernel, by card; cards of a capability that are alike in one row."""
    data = receipt("kernel_sequences")
    alike = ("capability", "sequences", "down_parts", "down_passes", "shared_memory", "limit", "one_more")
    key = lambda row: tuple(row[name] for name in alike)
    order = lambda row: (float(row["capability"]), -row["blocks"])
    rows = []
    for (capability, sequences, _, passes, used, limit, more), group in groupby(
        sorted(data["cards"], key=order), key
    ):
        cards = list(group)
        blocks = sorted({card["blocks"] for card in cards})
        span = f"{blocks[0]} to {blocks[-1]}" if len(blocks) > 1 else blocks[0]
        names = ", ".join(card["card"] for card in cards)
        memory = f"{used:,} of {limit:,}"
        rows.append((capability, names, span, f"**{sequences}**", passes, memory, f"{more:,}"))
    return table(
        "capability | cards | blocks | sequences | passes of down | shared memory | one sequence more", rows
    )
