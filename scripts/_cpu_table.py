"""Tables of CPUs: the native kernels beside llama.cpp, and a file as a packed checkpoint."""

from typing import Any

from scripts._receipts import receipt, table, whole


def native_rates(model: str) -> list[str]:
    """Decode from an empty cache and a prompt of 512 tokens on a CPU: here, and with llama.cpp beside it."""
    found = receipt("native_cpu")["models"][model]
    sides = (found["best"], {row: rate / found["ratios"][row] for row, rate in found["best"].items()})
    return [
        f"{_rate(side[written(found)])}; {_rate(side['pp512'])}" + unit
        for side, unit in zip(sides, (" tokens/s", ""), strict=True)
    ]


def written(found: dict[str, Any]) -> str:
    """The row of tokens written from an empty cache."""
    return next(row for row in found["best"] if row.startswith("tg"))


def _rate(value: float) -> str:
    return f"{value:.1f}" if value < 100 else whole(value)


def cpu() -> str:
    """The CPU's own kernels beside llama.cpp, one after the other on the same cores."""
    rows: list[tuple[object, ...]] = []
    for name, found in receipt("native_cpu")["models"].items():
        ratios, here, there = found["ratios"], found["here"], found["llama_cpp"]
        size = f"{name}, {found['bytes'] / 1e9:.2f} GB"
        for row, rate in found["best"].items():
            ratio = ratios[row]
            rows.append((size, row, _rate(rate), _rate(rate / ratio), f"{ratio:.2f}"))
        loads = [min(x["load_s"] for x in side) for side in (here, there)]
        peaks = [max(x["peak_bytes"] for x in side) / 1e9 for side in (here, there)]
        for words, unit, (ours, theirs) in (("load", "s", loads), ("peak memory", "GB", peaks)):
            rows.append((size, words, f"{ours:.2f} {unit}", f"{theirs:.2f} {unit}", f"{ours / theirs:.2f}"))
        shown = found["generate_tokens_per_s"]
        rows.append(
            (
                size,
                f"{written(found)} as `generate` shows it",
                _rate(shown),
                "",
                f"{found['generate_of_bench']:.2f} of `bench`",
            )
        )
    return table("file | what | here | llama.cpp | ratio", rows)


def packing() -> str:
    """The full-size file as a packed checkpoint."""
    convert, packed = receipt("convert_full_size"), receipt("full_size_cpu")["from_checkpoint"]
    rows = [
        (
            "pack the file",
            f"{convert['convert']['seconds']:.0f} s, peak {convert['convert']['peak_memory_gb']:.1f} GB",
        ),
        ("load the packed checkpoint", f"{packed['load_s']:.0f} s"),
    ]
    return table("what | measured", rows)
