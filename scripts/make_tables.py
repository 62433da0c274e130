"""Writes the measured tables of the README and the docs from ``docs/receipts/*.json``, and those of types.

    python -m scripts.make_tables            # after a new receipt
    python -m scripts.make_tables --check    # exit code 1 where a page is not what the receipts say

A page holds a table between two comments, ``<!-- table: NAME -->`` and ``<!-- end of table -->``; what is
between them is replaced. So no measured number is typed twice. A test runs the check.
"""

import argparse
import re
import sys
from collections.abc import Callable

from scripts import ROOT, _scaling_table
from scripts._compiled_table import compiled_kernels, kernel_sequences
from scripts._cpu_table import cpu, native_rates, packing
from scripts._paths_table import card_limit, mixes, paths
from scripts._receipts import (
    batch_rows,
    below_one,
    cache_memory,
    cold_start,
    decode_rows,
    finding,
    gate,
    memory_16g,
    percent,
    prefill_rows,
    quantization_loss,
    receipt,
    receipts,
    table,
    whole,
)
from scripts._types_table import types, types_in_words

BLOCK = re.compile(r"(<!-- table: ([\w-]+) -->\n).*?(<!-- end of table -->)", re.DOTALL)

STEPS = {
    "top-k a warp a row, one signal a block, mixed-type tiles loaded ahead": (
        "top-k: one warp per row; one signal per thread block; tiles of mixed types loaded ahead"
    ),
    "attention keeps the new token in registers; loads grouped": (
        "attention keeps the new token in registers; loads in groups"
    ),
    "loops instead of straight code; table in shared memory": "loops in place of unrolled tiles",
    "sequences loaded in groups, activations shared between tiles": (
        "activations of several sequences loaded at once"
    ),
}
"""Changes of the decode kernel in this page's words; the others are as the receipt says."""


def readme() -> str:
    """The README's six rows."""
    decode, prompts, batch, peer = decode_rows(), prefill_rows(), batch_rows(), receipt("llamacpp")["h100"]
    wgpu = receipt("wgpu_h200")
    beside_wgpu = wgpu["peer"]
    parity = finding("verify_embedded_cpu", "PARITY-001", "jax float32")["figure"]
    rows = [
        (
            "decode of 1 sequence; of 8; of 64 at depth 512",
            "H100, full size",
            f"**{whole(decode['1:0']['tok_s'])}**; {whole(decode['8:0']['tok_s'])}; "
            f"{whole(batch[64]['tokens_per_second'])} tokens/s",
            f"{peer['decode']['1:0']}; {whole(peer['decode_after_512']['8'])}; "
            f"{whole(peer['decode_after_512']['64'])}",
            _link("decode_user_h100", "batch_h100"),
        ),
        (
            "prompt of 2,048 tokens; of 32,768",
            "H100, full size",
            f"**{whole(prompts[1, 2048]['tokens_per_second'])}**; "
            f"{whole(prompts[1, 32768]['tokens_per_second'])} tokens/s",
            whole(peer["prefill"]["2048"]),
            _link("prefill_h100"),
        ),
        (
            f"wgpu: decode; prompt of {wgpu['prompt_tokens']}",
            "H200 through Vulkan, full size",
            f"{whole(wgpu['decode_tokens_per_s'])}; {whole(wgpu['prefill_tokens_per_s'])} tokens/s",
            f"{whole(beside_wgpu['decode_tokens_per_s'])}; {whole(beside_wgpu['prefill_tokens_per_s'])}",
            _link("wgpu_h200"),
        ),
        *(
            ("decode; prompt of 512", f"2 cores, {name}", *native_rates(model), _link("native_cpu"))
            for name, model in (("24 GB, full size", "full"), ("embedded model", "embedded"))
        ),
        (
            "minimum cosine to float64, 2,048 tokens",
            "4 cores, embedded model",
            below_one(parity),
            "",
            _link("verify_embedded_cpu"),
        ),
    ]
    return table("what | machine | here | llama.cpp | receipt", rows)


def _link(*names: str) -> str:
    return ", ".join(f"[{name}](docs/receipts/{name}.json)" for name in names)


def decode() -> str:
    """Decode of one to eight sequences by the user's path."""
    peer = {
        **receipt("llamacpp")["h100"]["decode"],
        "8:0": receipt("llamacpp")["h100"]["decode_after_512"]["8"],
    }
    names = {
        "1:0": "1 sequence, empty cache",
        "1:4096": "1 sequence, 4,096 tokens deep",
        "8:0": "8 sequences, empty cache",
    }
    rows = decode_rows()
    return table(
        "work | tokens/s | ms per step | llama.cpp, tokens/s",
        (
            (
                what,
                f"**{whole(rows[key]['tok_s'])}**",
                f"{rows[key]['ms_per_step']:.3f}",
                f"{peer[key]}" + (" (after prompts of 512)" if key == "8:0" else ""),
            )
            for key, what in names.items()
        ),
    )


def decode_steps() -> str:
    """The decode kernel's speed, change by change."""
    changes = [(STEPS.get(e["change"], e["change"]), e["tok_s"]) for e in receipt("decode_h100")["earlier"]]
    runs = receipt("decode_kernel_h100")["runs"]

    def of(commit: str, *tunings: str | None) -> dict[str, float]:
        return {
            case["case"]: case["tok_s"]
            for run in runs
            for case in run.get("cases", ())
            if run["commit"] == commit and case["work"] == "speed"
            if case.get("tuning") in (tunings or (None,)) and "without" not in case
        }

    changes += [
        ("integer products on tensor cores", of("94aacbb", "tensor_cores")),
        ("activations of a batch quantized once in the grid", of("9f7feb1", "", "sorted_experts=0")),
        ("down: a thread block takes 64 rows for half of the sequences", of("1c72a37", "wide_down")),
        ("router and norm in one pass", of("1fc4fc0")),
        ("addresses computed anew in each phase; pairs sorted by expert", of("9934805")),
    ]
    return table(
        "change | 1 sequence | at depth 4,096 | 8 sequences",
        (
            (change, *(whole(rates[key]) if key in rates else "" for key in ("1:0", "1:4096", "8:0")))
            for change, rates in changes
        ),
    )


def decode_phases() -> str:
    """Where a layer's time goes, of one version of the kernel."""
    runs = {run["batch"]: run for run in receipt("decode_phases_h100")["runs"] if run["commit"] == "dfe6db1"}
    of = {
        batch: {_phase(p["phase"]): p for p in run["phases"] if p["per"] == "layer"}
        for batch, run in runs.items()
    }
    norm = next(p for p in runs[8]["phases"] if p["phase"] == "norm")
    qkv = of[8]["norm, q/k/v"]
    of[8]["norm, q/k/v"] = {key: qkv[key] + norm[key] for key in ("us", "us_waiting")}
    rows = [
        (name, *(f"{of[batch][name][key]:.1f}" for batch in (1, 8) for key in ("us", "us_waiting")))
        for name in of[1]
    ]
    whole_layer = [f"{runs[batch]['us_per_layer']:.1f}" for batch in (1, 8)]
    rows.append(("layer", whole_layer[0], "", whole_layer[1], ""))
    return table(
        "phase | 1 sequence, us per layer | of it waiting | 8 sequences, us per layer | of it waiting", rows
    )


def _phase(name: str) -> str:
    names = {"norm, q k v": "norm, q/k/v", "q k v": "norm, q/k/v", "o": "output projection"}
    return names.get(name, name)


def decode_parts() -> str:
    """What each part of the decode kernel costs."""
    (run,) = (
        r for r in receipt("decode_kernel_h100")["runs"] if r.get("note") == "a part left out, experts given"
    )
    names = {
        "gate_up": "gate and up",
        "down": "down",
        "dense": "products of q/k/v and o, and their weights",
        "copies": "copies of quantized activations to shared memory",
    }
    us = {case["without"]: case["us_per_layer"] for case in run["cases"]}
    return table(
        f"left out | us per layer less, of {us['nothing']:.1f}",
        ((what, f"{us['nothing'] - us[key]:.1f}") for key, what in names.items()),
    )


def prefill() -> str:
    """Prompts and batches of the whole model."""
    prompts, batch = prefill_rows(), batch_rows()
    peer = receipt("llamacpp")["h100"]
    before = next(e for e in receipt("batch_h100")["earlier"] if "rows" in e)["rows"]
    mixed = next(row for row in before if row["work"] == "mixed")
    rows = [
        _prompt_row("prompt of 512 tokens", prompts[1, 512]),
        _prompt_row("prompt of 2,048 tokens", prompts[1, 2048], whole(peer["prefill"]["2048"])),
        _prompt_row("prompt of 32,768 tokens, in chunks of 2,048", prompts[1, 32768]),
        _prompt_row("32 prompts of 512 tokens", prompts[32, 512]),
        ("the same through a scheduler's `Batch`", whole(before[0]["tokens_per_second"]), "", ""),
        (
            f"8 new prompts of 512 tokens beside {32 - 8} sequences that write",
            f"{whole(mixed['prompt_tokens_per_second'])} read, "
            f"{whole(mixed['written_tokens_per_second'])} written",
            "",
            "",
        ),
    ]
    rows += [
        (
            f"decode of {n} sequences at depth 512",
            f"**{whole(row['tokens_per_second'])}** ({row['milliseconds_per_step']:.1f} ms per step)",
            f"{percent(row['share_of_limit'])} of memory",
            whole(peer["decode_after_512"][str(n)]),
        )
        for n, row in batch.items()
    ]
    return table("work | tokens/s | share of the limit | llama.cpp", rows)


def _prompt_row(what: str, row: dict, peer: str = "") -> tuple[str, ...]:
    seconds = row["seconds"]
    took = f"{1e3 * seconds:.1f} ms" if seconds < 1 else f"{seconds:.2f} s"
    share = f"{percent(row['share_of_limit'])} of the tensor cores"
    return what, f"**{whole(row['tokens_per_second'])}** ({took})", share, peer


def _ops() -> dict[str, float]:
    return {row["name"]: row["microseconds"] for row in receipt("ops_h100")["rows"]}


def prefill_ops() -> str:
    """Products and the expert layer alone."""
    us = _ops()
    cell = lambda name: f"{us[name]:.3g}" if name in us else ""
    kinds = ("even down Q4_K", "even down Q6_K", "zipf down Q4_K", "one down Q4_K")
    return table(
        "tokens | q_proj | k_proj | o_proj | lm_head | moe_mlp, even | down Q6_K | Zipf | all to 8 experts",
        (
            (
                whole(tokens),
                *(
                    cell(f"quantized_matmul {op} {tokens} tokens")
                    for op in ("q_proj", "k_proj", "o_proj", "lm_head")
                ),
                *(cell(f"moe_mlp {tokens} tokens {kind}") for kind in kinds),
            )
            for tokens in (32, 64, 512, 2048)
        ),
    )


def attention() -> str:
    """Flash attention against cuDNN's."""
    us = _ops()
    shapes = {
        "1 x 512 after 0": "512 tokens after 0",
        "1 x 2048 after 0": "2,048 after 0",
        "1 x 2048 after 30720": "2,048 after 30,720",
        "32 x 512 after 0": "32 x 512 after 0",
    }
    cell = lambda name: (
        f"{us[name]:,.3g}" if us.get(name, 1e9) < 1e3 else f"{us[name]:,.0f}" if name in us else ""
    )
    return table(
        "tokens | kernel, us | cuDNN, us",
        (
            (what, cell(f"attention {key} kernel"), cell(f"attention {key} cuDNN"))
            for key, what in shapes.items()
        ),
    )


def parity() -> str:
    """The parity of each backend on the embedded model."""
    rows = []
    for subject in ("reference float32", "jax float32", "jax bfloat16"):
        figures = finding("verify_embedded_cpu", "PARITY-001", subject)["figures"]
        text = finding("verify_embedded_cpu", "TEXT-001", subject)["figures"]
        flips = finding("verify_embedded_cpu", "ROUTING-001", subject)["figures"]
        rows.append(
            (
                subject,
                below_one(figures["replayed"]["cosine_min"]),
                below_one(figures["free_running"]["cosine_min"]),
                f"{text['free_running_kl_mean']:.0e}",
                f"{100 * text['free_running_top1_agreement']:.1f} %",
                f"{flips['differing']} of {flips['choices']:,}, {flips['unexplained']} unexplained",
            )
        )
    return table(
        "backend | minimum cosine, replayed | free-running | KL, nats | same best token | other choices",
        rows,
    )


def start_up() -> str:
    """Seconds of a new process and device memory, full size on an H100."""
    cold, memory = cold_start(), cache_memory()
    rows = [
        (f"new process to {step}, {cache} cache of programs", f"{cold[key][step]:.1f} s")
        for key, cache in (("first", "empty"), ("warm", "full"))
        for step in ("loaded", "first token", "second token")
    ]
    rows.append(
        (
            f"device memory at the peak, context {memory['context']:,}",
            f"{memory['peak_bytes'] / 1e9:.1f} GB, {memory['cache_bytes'] / 1e9:.1f} of them cache",
        )
    )
    return table("what | measured", rows)


def wgpu() -> str:
    """The full-size file through Vulkan."""
    r = receipt("wgpu_h200")
    rows = [
        ("first load on a machine; the next process", f"{r['first_load_s']:.1f}; {r['load_s']:.1f} s"),
        ("decode", f"{whole(r['decode_tokens_per_s'])} tokens/s"),
        (f"prompt of {r['prompt_tokens']}", f"{whole(r['prefill_tokens_per_s'])} tokens/s"),
        ("weights and cache read per second of decode", f"{whole(r['decode_gb_per_s'])} GB"),
        (
            "over llama.cpp through Vulkan, the same card: decode; prompt",
            f"{r['decode_tokens_per_s_of_peer']:.2f}; {r['prefill_tokens_per_s_of_peer']:.2f}",
        ),
        (
            "memory of the card; over file and cache",
            f"{r['gpu_bytes'] / 1e9:.1f} GB; {r['gpu_bytes_over_needed']:.3f}",
        ),
        (
            "minimum cosine to the float32 reference, three tokens",
            below_one(min(r["parity"]["parity_cosine"])),
        ),
        (
            "96 tokens by dots of bytes against float32 kernels, NMSE",
            f"{r['prompt_kernels_by_dots']['variants']['dots 64x32 4x4']['nmse']:.1e}",
        ),
    ]
    return table("what | measured", rows)


TABLES: dict[str, Callable[[], str]] = {
    "readme": readme,
    "decode": decode,
    "decode-steps": decode_steps,
    "decode-phases": decode_phases,
    "decode-parts": decode_parts,
    "prefill": prefill,
    "prefill-ops": prefill_ops,
    "attention": attention,
    "parity": parity,
    "start-up": start_up,
    "compiled": compiled_kernels,
    "kernel-sequences": kernel_sequences,
    "paths": paths,
    "cpu": cpu,
    "packing": packing,
    "wgpu": wgpu,
    "gate": gate,
    "memory-16g": memory_16g,
    "mixes": mixes,
    "card-limit": card_limit,
    "quantization-loss": quantization_loss,
    "scaling-one-host": _scaling_table.one_host,
    "scaling-four-hosts": _scaling_table.four_hosts,
    "scaling-without-nvlink": _scaling_table.without_nvlink,
    "scaling-memory": _scaling_table.memory,
    "scaling-errors": _scaling_table.errors,
    "scaling-constants": _scaling_table.constants,
    "receipts": receipts,
    "types": types,
    "types-in-words": types_in_words,
}


def filled(text: str) -> str:
    """The page with its tables made again; KeyError names a table that is not known."""
    return BLOCK.sub(lambda found: found[1] + TABLES[found[2]]() + found[3], text)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing; 1 where a page differs")
    args = parser.parse_args(argv)
    stale = 0
    for path in [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]:
        text = path.read_text()
        if (new := filled(text)) == text:
            continue
        stale += 1
        print(f"{path.relative_to(ROOT)}: {'not what the receipts say' if args.check else 'written'}")
        if not args.check:
            path.write_text(new)
    return int(args.check and stale > 0)


if __name__ == "__main__":
    sys.exit(main())
