"""Tables of one H100: both sets of kernels, six published mixtures, and a limit of 22.8 GB."""

from scripts._receipts import percent, receipt, table, whole

DECODE = {
    "1:0": "decode, 1 sequence",
    "8:0": "decode, 8 sequences",
    "1:4096": "decode, 1 at a depth of 4,096",
}
PROMPTS = {(1, 512): "prompt of 512", (1, 2048): "prompt of 2,048", (32, 512): "32 prompts of 512"}


def paths() -> str:
    """Tokens per second of each set of kernels, forced: ``paths_h100``, ``decode_portable_full_h100``."""
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


def mixes() -> str:
    """Decode of published mixtures: ``mixes_h100``."""

    def cells(mix: dict) -> tuple[str, ...]:
        rows = [(whole(row["tok_s"]), percent(row["share_of_limit"])) for row in mix["rows"]]
        return (mix["mix"], f"{mix['file_bytes'] / 1e9:.1f} GB", *(cell for row in rows for cell in row))

    head = "mixture | file | 1 sequence, tokens/s | share of memory's limit | 8 sequences | share"
    return table(head, map(cells, receipt("mixes_h100")["mixes"]))


def card_limit() -> str:
    """A full-size file where arrays may take 22.8 GB: ``card_limit_h100``."""
    found = receipt("card_limit_h100")
    loaded, *runs = found["steps"]
    rows = [
        ("planned", f"{found['plan']['total'] / 1e9:.2f} GB"),
        ("peak while loading", f"{loaded['peak'] / 1e9:.2f} GB"),
        ("peak with a full context", f"{found['peak'] / 1e9:.2f} GB"),
    ]
    for run in runs:
        if run["attempt"] == "again":
            read, written = whole(run["prompt_tokens_per_s"]), whole(run["tokens_per_s"])
            rows.append((f"prompt of {run['prompt']:,}; decode after it", f"{read}; {written} tokens/s"))
    return table(f"{found['context']:,} tokens of {found['kv_cache']} cache | measured", rows)
