"""The receipts as the tables read them, and how a table and its numbers are written."""

import json
from collections.abc import Iterable
from functools import cache
from pathlib import Path

from qwen3_moe_jax.convert.progress import format_bytes
from scripts import ROOT

RECEIPTS = ROOT / "docs" / "receipts"
Rows = Iterable[tuple[object, ...]]


@cache
def receipt(name: str) -> dict:
    """One receipt."""
    return json.loads((RECEIPTS / f"{name}.json").read_text())


def write_rows(path: Path, facts: dict, name: str, rows: Iterable[dict]) -> None:
    """A receipt of ``facts`` with a line for each row, under ``name``."""
    head = json.dumps(facts, indent=1).removesuffix("\n}")
    lines = ",\n  ".join(json.dumps(row) for row in rows)
    path.write_text(f'{head},\n "{name}": [\n  {lines}\n ]\n}}\n')


def table(head: str, rows: Rows) -> str:
    """A Markdown table; ``head`` holds the columns' names, between bars."""
    columns = head.split("|")
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join(f"| {' | '.join(str(cell).strip() for cell in line)} |" for line in lines) + "\n"


def whole(number: float) -> str:
    """A rate as a whole number with thousands apart."""
    return f"{number:,.0f}"


def percent(share: float) -> str:
    """A share as whole percent."""
    return f"{100 * share:.0f} %"


def below_one(cosine: float) -> str:
    """A cosine as its distance from 1."""
    return f"1 - {1 - cosine:.0e}".replace("e-0", "e-")


# What the receipts hold, by the names that the tables use


def decode_rows(name: str = "decode_user_h100") -> dict[str, dict]:
    """Rows BATCH:DEPTH of the user's path."""
    return {row["row"]: row for row in receipt(name)["figures"]["rows"]}


def prefill_rows() -> dict[tuple[int, int], dict]:
    """Rows (sequences, tokens) of prompts."""
    return {(row["sequences"], row["tokens"]): row for row in receipt("prefill_h100")["prefill"]}


def batch_rows() -> dict[int, dict]:
    """Decode of many sequences, by their number."""
    return {row["sequences"]: row for row in receipt("batch_h100")["figures"]["batches"]}


def cold_start() -> dict[str, dict]:
    """Seconds of a new process, with an empty and a full cache of programs."""
    return _first_receipt_with("cold")["cold"]


def cache_memory() -> dict:
    """Peak device memory with a long context."""
    return _first_receipt_with("memory")["memory"][0]


def _first_receipt_with(key: str) -> dict:
    newest = receipt("decode_user_h100")
    runs = [newest, *newest.get("earlier", ())]
    return next(run["figures"] for run in runs if key in run.get("figures", {}))


def finding(name: str, clause: str, subject: str) -> dict:
    """One finding of ``verify``."""
    found = receipt(name)["findings"]
    return next(f for f in found if (f["clause"], f["subject"]) == (clause, subject))


def gate() -> str:
    """Random files by what is odd about their weights: how far float32 is from float64."""
    styles = receipt("gate_random_files")["styles"]
    rows = [(n, s["compared"], f"{s['distance']:.1e}", f"{s['rounded_once']:.1e}") for n, s in styles.items()]
    return table("weights | files | float32 | exact sums, rounded once", rows)


def quantization_loss() -> str:
    """What each type loses on the embedded model."""
    data, rows = receipt("quantization_loss"), []
    for row in data["rows"]:
        if reason := row.get("left_out"):
            rows.append((row["type"], "", reason, "", "", ""))
            continue
        bits, near_all = f"{row['bits_per_weight']:.2f}", f"{row['kl_99']:.4f}"
        kl = f"{row['kl']:.4f} +- {row['kl_error']:.4f}"
        same, perplexity = f"{100 * row['top_1']:.1f} %", f"{row['perplexity']:.2f}"
        rows.append((row["type"], bits, kl, near_all, same, perplexity))
    kl = f"KL of {data['tokens_scored']} tokens, nats"
    return table(f"type | bits per weight | {kl} | 99 % below | likeliest agrees | perplexity", rows)


def memory_16g() -> str:
    """A 30B model under a limit of 16 GiB: where its weights are, its starts, and what they took."""
    rows = []
    for run in receipt("memory_16g_cpu")["runs"]:
        name = f"{run['mix']}, context {run['context']:,}, {run['kv_cache']} cache"
        *before, last = run["starts"]
        place = f"a file, {format_bytes(run['plan']['weights'])}" if last["weights"] else "memory"
        rate = f"{last['tokens_per_s']:.1f}"
        if held := last.get("resident"):
            rate += f"; {held['tokens_per_s']:.1f} with {held['share']:.0%} resident"
        is_first = not run.get("had_file", False)
        first = f"{run['starts'][0]['load_s']:.0f} s" if is_first else "file was there"
        again = f"{last['load_s']:.0f} s" if before else ""
        anonymous = max((start.get("peak_anonymous", 0) for start in run["starts"]), default=0)
        peak = format_bytes(anonymous) if anonymous else f"{format_bytes(last['peak_resident'])} resident"
        busy = run.get("load_average", "")
        rows.append((name, format_bytes(run["plan"]["total"]), place, first, again, peak, rate, busy))
    head = (
        "model | planned | weights in | first load | second load | anonymous, peak | tokens/s | load average"
    )
    return table(head, rows)


def receipts() -> str:
    """All receipts: what each holds, where and when it was measured."""
    rows = []
    for path in sorted(RECEIPTS.glob("*.json")):
        data = json.loads(path.read_text())
        first = data.get("direct", data)
        what = first.get("what") or first.get("command") or first.get("file", "")
        what = f"`verify` of {what['name']}" if isinstance(what, dict) else str(what)
        machine = first.get("device") or first.get("machine") or first.get("h100", {}).get("device", "")
        machine = machine.get("system", "") if isinstance(machine, dict) else machine
        if "backends" in first:
            machine = first["backends"][0]["device"]
        date = str(first.get("date") or first.get("created", ""))[:10]
        rows.append(
            (
                f"[{path.stem}]({path.name})",
                what.replace("python scripts/", "").replace(" --json /tmp/pf_all.json", ""),
                machine,
                date,
            )
        )
    return table("receipt | what | machine | date", rows)
