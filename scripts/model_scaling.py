"""Works out how fast the models would be on many GPUs, from what was measured on one and two: a model.

    python -m scripts.model_scaling            # prints it, with its error where two GPUs were measured
    python -m scripts.model_scaling --write    # docs/receipts/scaling_model.json, and the picture
    python -m scripts.make_tables              # then: the tables of docs/reference/scaling.md

The page states the formula. What a device holds and reads comes from the product's own placement, so a change
of that changes the page. Constants come from receipts by name; links and NCCL's latencies from their makers.
"""

import argparse
import json
import math
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import cache
from types import SimpleNamespace
from typing import Any

import jax
import numpy as np

from qwen3_moe_jax.convert.config import PRESETS, Qwen3MoeConfig
from qwen3_moe_jax.convert.packed import packed_nbytes
from qwen3_moe_jax.convert.tensor_names import q4_k_m_types, tensor_specs
from qwen3_moe_jax.jax_backend.placement import Placement
from qwen3_moe_jax.jax_backend.sharding import MeshShape
from qwen3_moe_jax.kernels_pallas.decode_step import api
from qwen3_moe_jax.kernels_pallas.decode_step.exchange import Split
from qwen3_moe_jax.machine.limits import prefill_operations
from qwen3_moe_jax.machine.memory import cache_nbytes
from scripts import ROOT
from scripts._receipts import RECEIPTS, decode_rows, prefill_rows, receipt, write_rows
from scripts._scaling_plot import svg

SMALL, MIDDLE, LARGE = "Qwen3-30B-A3B", "Qwen3-235B-A22B", "Qwen3-Coder-480B-A35B"
MODELS = (SMALL, MIDDLE, LARGE)
PICTURE = ROOT / "docs" / "reference" / "pictures" / "scaling.svg"
RECEIPT = RECEIPTS / "scaling_model.json"
DEPTH = 512
"""Tokens of each sequence in the cache while it is decoded, as where two GPUs were measured."""
CACHE_ITEMSIZE = 2
CACHE_POSITIONS = 65_536
"""Of the memory plan: 64 sequences of 1,024 tokens, or one of 65,536."""
CARD_NBYTES = 0.95 * 141e9
"""What arrays may take of an H200: JAX's share of 141 GB."""
PROMPT = 2048
WORK = {"decode 1": (1, 1), "decode 64": (64, 1), "prompt": (1, PROMPT)}
"""Sequences, and tokens of each per program."""
MACHINES = tuple((hosts, each) for hosts in (1, 4) for each in (1, 2, 4, 8))
"""Hosts, and GPUs of each."""
MAX_ONE_KERNEL = 16
"""Sequences; more go by launches for each layer."""


@dataclass(frozen=True)
class Link:
    """Bytes/s in one direction of a GPU's link, and microseconds of a hop in NCCL's model of latencies."""

    rate: float
    hop: float


NVLINK, PCIE = Link(450e9, 0.52), Link(64e9, 1.0)
NETWORK = Link(50e9, 5.0)
"""InfiniBand NDR, one port per GPU."""
HOP_BETWEEN_HOSTS = 1.8
"""By so much NCCL's model raises hops inside of hosts where there are several."""
COLLECTIVE = 22.5
"""Microseconds of a small one between two GPUs by NVLink, launch and all: 18 to 27 were measured."""
EXCHANGE = 1.9
"""Microseconds of a store, a signal and a wait inside of a kernel, measured between two GPUs by NVLink."""


# What a device holds and reads


@dataclass(frozen=True)
class GPU:
    """One that is not there."""

    number: int
    process_index: int = 0
    platform: str = "gpu"
    device_kind: str = "NVIDIA H200"


@dataclass(frozen=True)
class Part:
    """A device's part of a model.

    Attributes:
      dense, experts: bytes of weights that every step reads, and of all its experts.
      cached: bytes of its part of the cache of one token of one sequence.
      planned: bytes that the memory plan wants.
    """

    dense: int
    experts: int
    cached: float
    planned: int


def source_of(preset: str) -> Any:
    """What is asked of an open model of Q4_K_M, of one that is no file."""
    config = PRESETS[preset]
    specs = {spec.path: spec for spec in tensor_specs(config)}
    return SimpleNamespace(config=config, types=q4_k_m_types(config), specs=specs)


@cache
def part_of(preset: str, shape: MeshShape) -> Part:
    """The part of every device of a mesh, or the whole model."""
    source = source_of(preset)
    devices: list[Any] = [GPU(i) for i in range(shape.size)]
    place = Placement.of(source, shape if shape.size > 1 else None, devices)
    shards = place.shards
    shape_of = shards.shape_of if shards else lambda spec: spec.shape
    nbytes = {path: packed_nbytes(source.types[path], shape_of(s)) for path, s in source.specs.items()}
    experts = sum(n for path, n in nbytes.items() if ".experts." in path)
    dense = sum(nbytes.values()) - experts - nbytes["embed_tokens"]
    whole = cache_nbytes(source.config, DEPTH, CACHE_ITEMSIZE)
    cached = shards.cache_nbytes(DEPTH, CACHE_ITEMSIZE) if shards else whole
    return Part(dense, experts, cached / DEPTH, place.planned(source, CACHE_POSITIONS, CACHE_ITEMSIZE).total)


def shapes_of(preset: str, devices: int) -> list[MeshShape]:
    """All ways to split a model over so many devices."""
    source = source_of(preset)
    shapes = [MeshShape(ep, devices // ep) for ep in range(1, devices + 1) if devices % ep == 0]
    return [shape for shape in shapes if not shape.problems(source.config, source.types)]


def share_used(config: Qwen3MoeConfig, sequences: int) -> float:
    """The share of the experts that so many sequences can be expected to choose together, evenly."""
    return 1 - (1 - config.num_experts_per_tok / config.num_experts) ** sequences


@cache
def busiest(chosen: int, groups: int) -> float:
    """How many of ``chosen`` experts the group with most of them can be expected to have, drawn evenly.

    Counts of groups are Poisson's, given their sum: the share of draws where none is over a limit.
    """
    counts, mean = np.arange(chosen + 1), chosen / groups
    logs = np.array([math.lgamma(k + 1) for k in counts])
    of_group = np.exp(counts * math.log(mean) - mean - logs)
    of_sum = math.exp(chosen * math.log(chosen) - chosen - logs[-1])
    expected = 0.0
    for limit in range(chosen):
        ways = np.eye(1, chosen + 1)[0]
        for _ in range(groups):
            ways = np.convolve(ways, np.where(counts <= limit, of_group, 0.0))[: chosen + 1]
        expected += 1 - min(1.0, ways[chosen] / of_sum)
    return expected


# How long a program takes


@dataclass(frozen=True)
class Constants:
    """What was measured, in seconds and bytes per second.

    Attributes:
      phase: of a layer in the decode kernel, beside its bytes: waits of the grid.
      kernel_rate: bytes of weights and cache per second in the decode kernel.
      sampling: of a step outside of the kernel.
      launches: of a layer that goes by launches, beside its bytes.
      layer_rate: bytes per second layer by layer.
      prompt_layer: of a layer of a chunk of a prompt, beside its operations.
      product_rate: operations per second of prompts.
    """

    phase: float
    kernel_rate: float
    sampling: float
    launches: float
    layer_rate: float
    prompt_layer: float
    product_rate: float


def line(first: tuple[float, float], second: tuple[float, float]) -> tuple[float, float]:
    """(seconds at zero, rate) of the line through two points (amount, seconds)."""
    rate = (second[0] - first[0]) / (second[1] - first[1])
    return first[1] - first[0] / rate, rate


def collective(hosts: int, each: int, link: Link, nbytes: float) -> float:
    """Seconds of a sum over all GPUs of ``nbytes`` that every GPU has."""
    if hosts * each == 1:
        return 0.0
    hop = link.hop * (HOP_BETWEEN_HOSTS if hosts > 1 else 1)
    hops = 2 * ((each - 1) * hop + math.log2(hosts) * NETWORK.hop)
    inside = 2 * (each - 1) / each * nbytes / link.rate
    between = 2 * (hosts - 1) / hosts * nbytes / each / NETWORK.rate
    return (COLLECTIVE - 2 * NVLINK.hop + hops) * 1e-6 + inside + between


@dataclass(frozen=True)
class Model:
    """Seconds of a program; ``c`` are the constants."""

    c: Constants

    def one_kernel(self, preset: str, shape: MeshShape, sequences: int, depth: int = DEPTH) -> float:
        """A token of each sequence, in one kernel per group of sequences that shared memory holds.

        With ``ep`` a device multiplies as many pairs as one alone, so that only ``tp`` divides the experts.
        """
        config, part = PRESETS[preset], part_of(preset, shape)
        split = Split(shape.ep, shape.tp)
        grid = api.Device.of_cores(132, kernels="hopper", mesh=split)
        size = api.kernel_batch(split.part_of(config, config.vocab_size), grid)
        layers, total = config.num_hidden_layers, self.c.sampling
        for first in range(0, sequences, size):
            here = min(size, sequences - first)
            experts = part.experts * shape.ep * share_used(config, here)
            nbytes = part.dense + experts + part.cached * depth * here
            total += layers * self.c.phase + nbytes / self.c.kernel_rate
            total += 2 * layers * EXCHANGE * 1e-6 * (shape.size > 1)
        return total

    def by_layers(
        self, preset: str, shape: MeshShape, sequences: int, hosts: int = 1, link: Link = NVLINK
    ) -> float:
        """A token of each sequence, by launches for each layer; the busiest device is waited for."""
        config = PRESETS[preset]
        seconds = self.c.sampling + config.num_hidden_layers * self.c.launches
        seconds += layer_nbytes(preset, shape, sequences) / self.c.layer_rate
        return seconds + sums(config, shape, hosts, link, sequences)

    def prompt(
        self, preset: str, shape: MeshShape, tokens: int, hosts: int = 1, link: Link = NVLINK
    ) -> float:
        """A prompt of one chunk."""
        config = PRESETS[preset]
        operations = prefill_operations(config, 1, tokens) / shape.size
        seconds = config.num_hidden_layers * self.c.prompt_layer + operations / self.c.product_rate
        return seconds + sums(config, shape, hosts, link, tokens)

    def seconds(self, work: str, preset: str, shape: MeshShape, hosts: int, link: Link) -> float:
        """Of the work as this machine would do it."""
        sequences, tokens = WORK[work]
        if tokens > 1:
            return self.prompt(preset, shape, tokens, hosts, link)
        if sequences <= MAX_ONE_KERNEL and hosts == 1 and (link is NVLINK or shape.size == 1):
            return self.one_kernel(preset, shape, sequences)
        return self.by_layers(preset, shape, sequences, hosts, link)


def layer_nbytes(preset: str, shape: MeshShape, sequences: int) -> float:
    """Bytes that the busiest device reads in a step layer by layer."""
    config, part = PRESETS[preset], part_of(preset, shape)
    chosen = config.num_experts * share_used(config, sequences)
    uneven = busiest(round(chosen), shape.ep) / (round(chosen) / shape.ep)
    used = part.experts * share_used(config, sequences) * uneven
    return part.dense + used + part.cached * DEPTH * sequences


def sums(config: Qwen3MoeConfig, shape: MeshShape, hosts: int, link: Link, rows: int) -> float:
    """Seconds of a program's collectives: two float32 sums of ``rows`` per layer, and the head's gather."""
    number = 2 * config.num_hidden_layers + 1
    return number * collective(hosts, shape.size // hosts, link, 4.0 * config.hidden_size * rows)


@cache
def calibrated() -> Model:
    """The model with its constants, of the 30B model: from one GPU, but for ``launches``, which needs two."""
    one, config = MeshShape(), PRESETS[SMALL]
    layers, part, user = config.num_hidden_layers, part_of(SMALL, one), decode_rows()
    read = lambda n: part.dense + part.experts * share_used(config, n)
    ms = lambda key: user[key]["ms_per_step"] * 1e-3
    waits, kernel_rate = line((read(1), ms("1:0")), (read(8), ms("8:0")))
    prompts = prefill_rows()
    point = lambda n: (prefill_operations(config, 1, n), prompts[1, n]["seconds"])
    chunk, product_rate = line(point(512), point(PROMPT))
    guess = Constants(waits / layers, kernel_rate, 0.0, 0.0, 1.0, chunk / layers, product_rate)
    sampling = measured("one GPU, 30B", 1) - Model(guess).one_kernel(SMALL, one, 1)
    # Layer by layer: launches and the rate, from 64 sequences on one GPU and one sequence on two.
    two = MeshShape(ep=2)
    rows = [(measured("one GPU, 30B", 64) - sampling, layer_nbytes(SMALL, one, 64))]
    left = measured("layer by layer", 1, "30B ep=2") - sampling - sums(config, two, 1, NVLINK, 1)
    rows.append((left, layer_nbytes(SMALL, two, 1)))
    launched, layer_rate = line((rows[1][1], rows[1][0]), (rows[0][1], rows[0][0]))
    return Model(
        Constants(
            waits / layers, kernel_rate, sampling, launched / layers, layer_rate, chunk / layers, product_rate
        )
    )


def measured(key: str, sequences: int, of: str = "") -> float:
    """Seconds of a step in ``mesh_h200``."""
    found = receipt("mesh_h200")["one_kernel"][key]
    rows = found[of] if of else found
    return next(r["milliseconds_per_step"] for r in rows if r["sequences"] == sequences) * 1e-3


# What comes out


def checks() -> Iterator[dict]:
    """What was measured on two GPUs, and what the model says of it."""
    model = calibrated()

    def row(what: str, seconds: float, expected: float, *, is_used: bool = False) -> dict:
        error = expected / seconds - 1
        return {"what": what, "measured_ms": round(seconds * 1e3, 3), "model_ms": round(expected * 1e3, 3),
                "error": round(error, 4), "is_used": is_used}  # fmt: skip

    for preset, name, shape in (
        (SMALL, "30B ep=2", MeshShape(ep=2)),
        (MIDDLE, "235B tp=2", MeshShape(tp=2)),
        (MIDDLE, "235B ep=2", MeshShape(ep=2)),
    ):
        for found in receipt("mesh_h200")["one_kernel"][name]:
            n = found["sequences"]
            expected = model.one_kernel(preset, shape, n)
            yield row(f"{name}, decode of {n}, one kernel", measured(name, n), expected)
        for path in ("layer by layer", "few launches"):
            for found in receipt("mesh_h200")["one_kernel"][path].get(name, ()):
                n = found["sequences"]
                seconds, used = measured(path, n, name), (preset, n) == (SMALL, 1)
                expected = model.by_layers(preset, shape, n)
                yield row(f"{name}, decode of {n}, {path}", seconds, expected, is_used=used)
    for found in receipt("mesh_h200")["prefill"]:
        expected = model.prompt(SMALL, MeshShape(ep=2), found["prompt"])
        yield row(f"30B ep=2, prompt of {found['prompt']}", found["seconds"], expected)


def cells() -> Iterator[dict]:
    """Every model, work and machine, with the fastest way to split the model over it."""
    model = calibrated()
    for link in (NVLINK, PCIE):
        for preset in MODELS:
            for hosts, each in MACHINES:
                if link is PCIE and hosts > 1:
                    continue
                row: dict[str, Any] = {"model": preset, "link": "NVLink 4" if link is NVLINK else "PCIe 5"}
                row |= {"hosts": hosts, "gpus": each}
                shapes = shapes_of(preset, hosts * each)
                row["planned"] = min((part_of(preset, shape).planned for shape in shapes), default=None)
                fitting = [shape for shape in shapes if part_of(preset, shape).planned <= CARD_NBYTES]
                for work, (sequences, tokens) in WORK.items() if fitting else ():
                    timed = [(model.seconds(work, preset, shape, hosts, link), shape) for shape in fitting]
                    seconds, shape = min(timed, key=lambda pair: pair[0])
                    row[work] = round(sequences * tokens / seconds, 1)
                    row[f"{work} by"] = str(shape)
                yield row


def figures() -> dict[str, Any]:
    """All of it, as the receipt holds it."""
    constants = {name: float(f"{value:.4g}") for name, value in asdict(calibrated().c).items()}
    return {"constants": constants, "checks": list(checks()), "cells": list(cells())}


def picture(found: dict[str, Any]) -> str:
    """The picture of the page."""
    return svg(found["cells"], list(WORK), measured_points())


def measured_points() -> list[dict]:
    """Tokens per second that were measured, for the picture: model, work, GPUs."""
    one = lambda n, key: n / measured(key, n)
    rows = [(SMALL, "decode 1", 1, one(1, "one GPU, 30B")), (SMALL, "decode 64", 1, one(64, "one GPU, 30B"))]
    rows.append((SMALL, "decode 1", 2, one(1, "30B ep=2")))
    rows.append((MIDDLE, "decode 1", 2, 1 / measured("235B tp=2", 1)))
    for preset, name in ((SMALL, "30B ep=2"), (MIDDLE, "235B tp=2")):
        rows.append((preset, "decode 64", 2, 64 / measured("few launches", 64, name)))
    rows.append((SMALL, "prompt", 1, prefill_rows()[1, PROMPT]["tokens_per_second"]))
    return [{"model": m, "work": w, "gpus": n, "rate": rate} for m, w, n, rate in rows]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--write", action="store_true", help="the receipt and the picture")
    args = parser.parse_args()
    found = figures()
    print("\n".join(f"{name:14} {value:.4g}" for name, value in found["constants"].items()))
    for row in found["checks"]:
        print(f"{row['what']:45} {row['measured_ms']:8} ms, model {row['model_ms']:8} ms {row['error']:+.1%}")
    for row in found["cells"]:
        rates = "  ".join(f"{work} {row.get(work, '-')} ({row.get(f'{work} by', '')})" for work in WORK)
        machine = f"{row['link']:8} {row['hosts']} x {row['gpus']}"
        planned = "cannot be split" if row["planned"] is None else f"{row['planned'] / 1e9:.1f} GB"
        print(f"{machine} {row['model']:22} {planned:15}  {rates}")
    if args.write:
        facts = {
            "what": "a model, no measurement: tokens per second on 1 to 32 GPUs, from what 1 and 2 do",
            "date": time.strftime("%Y-%m-%d", time.gmtime()),
            "device": "none",
            "command": "python -m scripts.model_scaling --write",
            "versions": {"jax": jax.__version__},
            "constants": found["constants"],
            "checks": found["checks"],
        }
        write_rows(RECEIPT, facts, "cells", found["cells"])
        PICTURE.parent.mkdir(exist_ok=True)
        PICTURE.write_text(picture(found))
    print(json.dumps(found))


if __name__ == "__main__":
    main()
