"""The table of both sets of kernels on one H100, from ``paths_h100`` and ``decode_portable_full_h100``."""

from scripts._receipts import receipt, table, whole

DECODE = {
    "1:0": "decode, 1 sequence",
    "8:0": "decode, 8 sequences",
    "1:4096": "decode, 1 at a depth of 4,096",
}
PROMPTS = {(1, 512): "prompt of 512", (1, 2048): "prompt of 2,048", (32, 512): "32 prompts of 512"}


def paths() -> str:
    """Tokens per second of each set of kernels, forced."""
    found = receipt("paths_h100")
    alone = receipt("decode_portable_full_h100")["runs"][-1]["cases"]
    hopper = {row["row"]: row["tok_s"] for row in found["hopper"]["rows"]} | _prompts(found["hopper"])
    portable = {case["case"]: case["tok_s"] for case in alone if case["work"] == "speed"}
    portable |= _prompts(found["portable"])
    return table(
        "tokens/s on an H100 | hopper | portable",
        ((what, whole(hopper[key]), whole(portable[key])) for key, what in (DECODE | PROMPTS).items()),
    )


def _prompts(of: dict) -> dict[tuple[int, int], float]:
    return {(row["sequences"], row["tokens"]): row["tokens_per_second"] for row in of["prefill"]}
