"""Loads random files whose weights strain arithmetic: the load gate must find no fault in a right backend.

    python -m scripts.check_gate --files 100 --backends reference jax wgpu

Each file has its own mix of types, mean, scale and sizes: ordinary weights,
means of up to 10 standard deviations, constant blocks, random bytes with finite
scales, norms of 1e-30 and 1e30, weights that are denormal. Logits of every
backend are compared with a float64 reference's where float32 has place for them. What no float32
computation can do better stands beside that: the same in float64, with every matrix product summed
exactly and rounded to float32 once; and what the gate's model of rounding makes of each file: float64 with
every product off by one deviation, drawn up to 20 times. No distance may exceed the furthest draw.
Distances are 1 - cosine, of the worst of eight positions. The last line is JSON: files, loads, false
alarms, and the largest distances.
"""

import argparse
import json
import platform
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np

from qwen3_moe_jax import loader
from qwen3_moe_jax.convert.ggml_types import SUPPORTED_TYPES
from qwen3_moe_jax.convert.open_model import open_model
from qwen3_moe_jax.convert.packed import PackedTensor
from qwen3_moe_jax.convert.source import ModelSource
from qwen3_moe_jax.core.code_version import code_version
from qwen3_moe_jax.parity import gate
from qwen3_moe_jax.parity.metrics import cosine
from qwen3_moe_jax.parity.noise import FLOAT32_MAX, ROUNDING, careful_sigma
from qwen3_moe_jax.reference import ReferenceRunner, model, ops
from qwen3_moe_jax.testing.random_models import (
    SMALL,
    Style,
    constant_blocks,
    random_blocks,
    raw_blocks,
    shifted,
    write_random_gguf,
)
from scripts.plant_faults import commit

STYLES: dict[str, Style] = {
    "ordinary": Style(),
    "mean 5": shifted(5.0),
    "mean -5": shifted(-5.0),
    "mean 10": shifted(10.0),
    "mean -10": shifted(-10.0),
    "constant": Style(constant_blocks),
    "bytes": Style(raw_blocks),
    "large": Style(partial(random_blocks, std=20.0)),
    "tiny": Style(partial(random_blocks, std=1e-4)),
    "denormal": Style(partial(random_blocks, std=1e-41)),
    "norms 1e-30": Style(norm_scale=1e-30),
    "norms 1e30": Style(norm_scale=1e30),
    "norms 1e8, mean 5": replace(shifted(5.0), norm_scale=1e8),
    "bytes, norms 1e3": Style(raw_blocks, norm_scale=1e3),
    "constant, norms 0.01": Style(constant_blocks, norm_scale=0.01),
}
COSINE_STEPS = 16 * float(np.finfo(np.float64).eps)
"""1 - cosine of equal logits is a few of float64's steps."""

DRAWS = 20
"""One draw says little: those of a file of random bytes differ by a factor of 30. A backend that is as far
as one deviation is further than all of 20 in one file of 21."""

MIXES = ("q4_k_m", "all", "few_bits", *(f"only_{t.name.lower()}" for t in SUPPORTED_TYPES))
SIZES = (
    {},
    {"hidden_size": 512, "num_experts": 8, "num_experts_per_tok": 4},
    {"moe_intermediate_size": 512, "num_hidden_layers": 3, "num_key_value_heads": 4},
)


@dataclass(frozen=True)
class Case:
    """One random file."""

    number: int
    style: str
    mix: str
    sizes: dict[str, int]

    def write(self, path: Path) -> None:
        config = replace(SMALL, **self.sizes)
        write_random_gguf(path, config, mix=self.mix, seed=self.number, style=STYLES[self.style])


def cases(count: int) -> Iterator[Case]:
    """Every style with every mix in turn; sizes change more slowly."""
    styles = list(STYLES)
    for number in range(count):
        turn = number // len(styles)
        mix = MIXES[(number + turn) % len(MIXES)]
        yield Case(number, styles[number % len(styles)], mix, SIZES[number % len(SIZES)])


def check(case: Case, backend: str, folder: Path, dtype: str | None = None) -> dict[str, object]:
    """What the gate says of a backend with this file, and how near the logits are to float64's."""
    path = folder / f"{case.number}.gguf"
    if not path.exists():
        case.write(path)
    with open_model(path) as source:
        runner = loader.make_runner(source, backend, dtype=dtype)
        departures = gate.inspect(runner, source).departures
        ids = np.arange(1, 9)
        with np.errstate(all="ignore"):
            logits = runner.forward(ids).logits
            exact = ReferenceRunner(source, dtype=np.float64).forward(ids, capture=("Qcur", "l_out"))
            rounded = rounded_once(source, ids, exact.expert_ids)
            operand = ROUNDING[str(runner.describe()["compute_dtype"])]
            distance = lambda found: float(1 - cosine(exact.logits, found).min())
            drawn = 0.0
            for draw in range(DRAWS):  # until one is further
                noisy = with_noise(source, ids, exact.expert_ids, operand, draw)
                drawn = max(drawn, distance(noisy))
                if not distance(logits) > drawn + COSINE_STEPS:
                    break
        runner.close()
    largest = max(float(np.abs(stage).max()) for stage in exact.stages.values())
    is_in_range = np.isfinite(logits).all() and largest**2 * source.config.hidden_size < FLOAT32_MAX
    return {
        "style": case.style,
        "departures": [f"{d.where} ({d.type}): {d.sigmas:.1f} sigmas" for d in departures],
        "distance": distance(logits) if is_in_range else None,
        "rounded_once": distance(rounded) if is_in_range else None,
        "one_sigma": drawn if is_in_range else None,
    }


def rounded_once(source: ModelSource, ids: np.ndarray, expert_ids: np.ndarray) -> np.ndarray:
    """Logits of the float64 reference with these experts, every product of a matrix rounded to float32."""

    def once(product: Callable[..., np.ndarray]) -> Callable[..., np.ndarray]:
        return lambda *arguments: product(*arguments).astype(np.float32).astype(np.float64)

    return _with_products(source, ids, expert_ids, once(ops.matmul), once(ops.expert_matmul))


def with_noise(
    source: ModelSource, ids: np.ndarray, expert_ids: np.ndarray, operand: float, draw: int = 0
) -> np.ndarray:
    """Logits of the float64 reference, every product off by a normal deviate of the careful model.

    Args:
      source, ids, expert_ids: as of ``ReferenceRunner.forward``.
      operand: relative precision to which the backend rounds operands (``noise.ROUNDING``).
      draw: the number of this draw; others give other deviates.
    """
    rng, exact, exact_experts = np.random.default_rng((len(ids), draw)), ops.matmul, ops.expert_matmul

    def noise(x: np.ndarray, weight: PackedTensor) -> np.ndarray:
        return rng.standard_normal((len(x), weight.shape[0])) * careful_sigma(x, weight, operand)

    def of_experts(x: np.ndarray, weight: PackedTensor, chosen: np.ndarray, *rest: Any) -> np.ndarray:
        out = exact_experts(x, weight, chosen, *rest)
        for expert in np.unique(chosen):
            out[chosen == expert] += noise(x[chosen == expert], weight[expert])
        return out

    noisy = lambda x, weight, *rest: exact(x, weight, *rest) + noise(x, weight)
    return _with_products(source, ids, expert_ids, noisy, of_experts)


def _with_products(
    source: ModelSource,
    ids: np.ndarray,
    expert_ids: np.ndarray,
    matmul: Callable[..., np.ndarray],
    expert_matmul: Callable[..., np.ndarray],
) -> np.ndarray:
    def fill(texts: Sequence[ops.ChosenExperts], projections: Sequence[PackedTensor], _workers: Any) -> None:
        gate, up, down = projections
        for text in texts:
            inputs = np.repeat(text.h[:, None], text.ids.shape[1], axis=1)
            text.gate[...] = expert_matmul(inputs, gate, text.ids)
            text.up[...] = expert_matmul(inputs, up, text.ids)
            text.act[...] = ops.silu(text.gate) * text.up
            text.down[...] = expert_matmul(text.act, down, text.ids)

    with mock.patch.multiple(model, matmul=matmul, fill_experts=fill):
        return ReferenceRunner(source, dtype=np.float64).forward(ids, expert_ids=expert_ids).logits


def by_style(rows: list[dict[str, Any]]) -> dict[str, dict[str, object]]:
    """Files, and the largest distances, of every style that float32 has place for."""
    found: dict[str, dict[str, object]] = {}
    for style in STYLES:
        compared = [r for r in rows if r["style"] == style and r["distance"] is not None]
        if compared:
            found[style] = {
                "compared": len(compared),
                "distance": max(r["distance"] for r in compared),
                "rounded_once": max(r["rounded_once"] for r in compared),
                "one_sigma": max(r["one_sigma"] for r in compared),
            }
    return found


def is_far(row: dict[str, Any]) -> bool:
    """Whether a file's logits are further from float64's than every draw of one deviation makes them."""
    return row["distance"] is not None and row["distance"] > row["one_sigma"] + COSINE_STEPS


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--files", type=int, default=100)
    parser.add_argument("--backends", nargs="+", default=["reference", "jax"], choices=loader.BACKENDS)
    parser.add_argument("--dtype", help="of the jax backend")
    parser.add_argument("--only", type=int, help="one file, by its number")
    parser.add_argument("--json", metavar="FILE", help="write the last line here, too")
    args = parser.parse_args()
    rows, began = [], time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        for case in cases(args.files):
            if args.only not in (None, case.number):
                continue
            for backend in args.backends:
                found = check(case, backend, Path(folder), args.dtype if backend == "jax" else None)
                rows.append(found)
                words = "; ".join(found["departures"]) or "passes"
                name = f"{case.number:3} {case.style:20} {case.mix:7} {backend:9}"
                figures = (found["distance"], found["rounded_once"], found["one_sigma"])
                print(name, *figures, words, "TOO FAR" * is_far(found), flush=True)
            (Path(folder) / f"{case.number}.gguf").unlink()
            if "qwen3_moe_jax.jax_backend.programs" in sys.modules and case.number % 8 == 7:
                sys.modules["qwen3_moe_jax.jax_backend.programs"].forget()
    alarms = sum(bool(row["departures"]) for row in rows)
    result = {
        "what": "random files that strain arithmetic: the load gate's false alarms; 1 - cosine to float64",
        "command": " ".join(["python -m scripts.check_gate", *sys.argv[1:]]),
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "commit": commit(),
        "code_version": code_version(),
        "machine": platform.platform(),
        "files": args.files if args.only is None else 1,
        "loaded_on": args.backends,
        "dtype": args.dtype,
        "loads": len(rows),
        "false_alarms": alarms,
        "further_than_one_sigma": sum(map(is_far, rows)),
        "styles": by_style(rows),
        "seconds": round(time.perf_counter() - began, 1),
    }
    if args.json:
        Path(args.json).write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result))
    return 1 if alarms or result["further_than_one_sigma"] else 0


if __name__ == "__main__":
    raise SystemExit(main())
