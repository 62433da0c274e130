"""Compiles the Hopper kernels, or the model's step with them, for an H100 on a machine that has no GPU.

Needs the packages jax-cuda13-plugin and jax-cuda13-pjrt of JAX's version, and CUDA's ptxas. The decode kernel
is compiled for every target by ``scripts.compile_kernels``.

    python -m scripts.compile_for_hopper kernels                      # registers and spills of every size
    python -m scripts.compile_for_hopper step --tokens 1 --sequences 32 [--thunks]   # launches per layer
    python -m scripts.compile_for_hopper count FILE                   # launches in XLA's own dump
    python -m scripts.compile_for_hopper batch --slots 32             # scratch memory of a batch's programs

"step" compiles a chunk of prompts, or with one token each a step of decoding, and counts what the
loop over layers launches. On a machine with a GPU the same table comes from ``count`` and the file
``*thunk_sequence_after_thunk_passes.txt`` that XLA_FLAGS=--xla_dump_to=FOLDER leaves there.
"""

import argparse
import contextlib
import os
import re
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

os.environ["JAX_PLATFORMS"] = "cpu"

import jax
import jax.numpy as jnp
from jax.sharding import AbstractDevice, AbstractMesh, SingleDeviceSharding, use_abstract_mesh

from qwen3_moe_jax.convert.ggml_types import GGMLType
from qwen3_moe_jax.convert.tensor_names import q4_k_m_types
from qwen3_moe_jax.jax_backend.kv_cache import KVCache
from qwen3_moe_jax.jax_backend.params import GPU_ROLES
from qwen3_moe_jax.jax_backend.qwen3_moe import Qwen3Moe
from qwen3_moe_jax.kernels_pallas.attention import kernel_sm90 as attention
from qwen3_moe_jax.kernels_pallas.decode_layers import api as decode_layers_api
from qwen3_moe_jax.kernels_pallas.gpu import cards, device
from qwen3_moe_jax.kernels_pallas.gpu.grouped_matmul_config import (
    REGISTERS,
    MatmulConfig,
    OfLayer,
    dense_config,
    experts_config,
    few_config,
    pick_config,
)
from qwen3_moe_jax.kernels_pallas.gpu.grouped_matmul_sm90 import (
    Kernel,
    grouped_matmul,
)
from qwen3_moe_jax.kernels_pallas.gpu.sorting import Tiles, UsedExperts
from qwen3_moe_jax.kernels_pallas.gpu.tile_arrays import TILE_ARRAYS
from qwen3_moe_jax.kernels_pallas.packed.stacks import Matrices
from scripts import _hopper_batch, _random_params, bench_prefill
from scripts._absent_gpu import first_card, ptxas_report, sharding_of
from scripts._captured import captured_output

H100 = cards.capabilities()["9.0"]
FILE_REGISTERS = 65536
TYPES = tuple(TILE_ARRAYS)


def h100() -> SingleDeviceSharding:
    """An H100 that is not there."""
    return sharding_of(H100)


@contextlib.contextmanager
def as_on_h100() -> Iterator[None]:
    """The ops believe in a Hopper GPU meanwhile, and kernels are sized for one."""
    named = AbstractDevice(device_kind="NVIDIA H100 80GB HBM3", num_cores=first_card(H100)[1], platform="gpu")
    with contextlib.ExitStack() as patches:
        for module in (
            attention,
            decode_layers_api,
            device,
        ):
            patches.enter_context(mock.patch.object(module, "require_hopper", return_value=None))
        patches.enter_context(mock.patch.object(device, "require_ampere", return_value=None))
        patches.enter_context(use_abstract_mesh(AbstractMesh((), (), abstract_device=named)))
        yield


# Kernels


@dataclass(frozen=True)
class Case:
    """One compiled kernel: ``kind`` is "few", "sorted" or "dense"."""

    kind: str
    type: GGMLType
    fused: bool
    config: MatmulConfig
    splits: int = 1

    def __str__(self) -> str:
        c = self.config
        sizes = f"{c.tile:4} {','.join(map(str, c.widths)):12} {c.slabs} {c.warpgroups} {c.in_flight}"
        name = "swiglu" if self.fused else "plain"
        return f"{self.kind:6} {self.type.name} {name:6} {sizes} {'yes' if c.exchange else 'no ':3}"


def cases() -> list[Case]:
    """Every size that the ops choose, and those that ``bench_gpu_ops.py --sizes`` tries."""
    found = []
    for fused in (True, False):
        for type in TYPES:
            found += [Case("few", type, fused, few_config(tokens, type)) for tokens in (8, 16)]
            sorted_sizes = (experts_config(), pick_config(8), pick_config(128))
            found += [Case("sorted", type, fused, config) for config in sorted_sizes]
            if type is GGMLType.Q4_K or not fused:
                found.append(Case("sorted", type, fused, MatmulConfig(256, (128, 192, 256), 1)))
    for type in TYPES:
        for tokens in (8, 32, 64, 512):
            config, splits = dense_config(tokens, 4096, 2048)
            found.append(Case("dense", type, False, config, splits))
    return found


def compile_case(case: Case, sharding: SingleDeviceSharding) -> tuple[int, int]:
    """Compiles one; gives its slots of weights and of x."""
    experts = 1 if case.kind == "dense" else 128
    rows, columns = (768, 2048) if case.fused else (2048, 768)
    if case.kind == "dense":
        rows, columns = 4096, 2048
    shape = (rows, columns) if case.kind == "dense" else (experts, rows, columns)
    stack = jax.eval_shape(lambda: _random_params.random_matrices(0, case.type, experts * rows, columns))
    w = Matrices(stack, jax.ShapeDtypeStruct((), jnp.int32), shape)
    tile = case.config.tile
    kernel = Kernel(w, case.fused, case.config, case.splits, None)
    numbers = lambda n: jax.ShapeDtypeStruct((n,), jnp.int32)
    options = {"config": case.config, "splits": case.splits}
    if case.kind == "few":
        work = UsedExperts(numbers(experts), numbers(1))
        x_rows = tile if case.fused else experts * tile
    else:
        work = Tiles(*(numbers(256) for _ in range(3)), numbers(1))
        x_rows = 4 * tile

    def run(x, scale, work, destinations, layer, table, *weights):
        extra = (
            {"destinations": destinations, "out_rows": 8 * tile}
            if case.kind == "few" and not case.fused
            else {}
        )
        if case.kind != "sorted" and tile in (32, 64):  # as decode_layers calls it
            extra["of_layer"] = OfLayer(layer, table, (0,) * len(weights), 48)
        return grouped_matmul(x, scale, work, weights, **extra, **options)

    arguments = (
        jax.ShapeDtypeStruct((x_rows, columns), jnp.float16),
        jax.ShapeDtypeStruct((x_rows,), jnp.float32),
        work,
        numbers(experts * tile),
        numbers(1),
        numbers(96),
        *([w] * (2 if case.fused else 1)),
    )
    there = lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=sharding)
    jax.jit(run).trace(*jax.tree.map(there, arguments)).lower(lowering_platforms=("cuda",)).compile()
    return kernel.weight_stages, kernel.x_stages


def kernels(args: argparse.Namespace) -> int:
    """Prints ptxas' report of every case; the number of those that spill, serialize or ask for too much."""
    os.environ["MOSAIC_GPU_DUMP_PTXAS"] = "1"
    sharding, bad = h100(), 0
    print(
        "kind   type op     tile widths     slabs, warpgroups, in flight, exchange | registers, slots | found"
    )
    with as_on_h100():
        found = cases()
    for case in found:
        if args.only not in str(case):
            continue
        with captured_output() as lines, as_on_h100():
            slots = compile_case(case, sharding)
        text = "\n".join(lines)
        used, spilled = ptxas_report(text).values()
        threads = 128 * (case.config.warpgroups + 1)
        increased, decreased = REGISTERS[case.config.warpgroups]
        wanted = case.config.warpgroups * increased + decreased
        faults = []
        if not used:
            faults.append("ptxas reported nothing")
        if spilled:
            faults.append(f"spills {spilled} bytes")
        if "C7512" in text or "serialized" in text:
            faults.append("products serialized (C7512)")
        if "C7508" in text or "setmaxnreg ignored" in text:
            faults.append("exchange ignored (C7508)")
        if case.config.exchange and wanted > (case.config.warpgroups + 1) * used:
            faults.append(f"asks for {wanted} of {(case.config.warpgroups + 1) * used} registers: never ends")
        if threads * (-(-used // 8) * 8) > FILE_REGISTERS:
            faults.append(f"{threads} threads do not fit")
        bad += bool(faults)
        print(f"{case} | {used:3} {slots[0]} {slots[1]} | {'; '.join(faults) or 'ok'}", flush=True)
    print(f"{bad} with faults")
    return bad


# A step of the model


def compile_step(args: argparse.Namespace) -> None:
    sharding = h100()
    config = bench_prefill.PRESETS[args.preset]
    types = q4_k_m_types(config)
    model = Qwen3Moe(config, jnp.bfloat16)
    arguments = jax.eval_shape(
        lambda: (
            _random_params.random_params(config, types, GPU_ROLES),
            KVCache.create(config, args.sequences, args.length, jnp.bfloat16),
            jnp.zeros((args.sequences, args.tokens), jnp.int32),
            jnp.zeros(args.sequences, jnp.int32),
        )
    )
    there = lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=sharding)
    began = time.perf_counter()
    with as_on_h100():
        traced = bench_prefill.chunk_step.trace(model, *jax.tree.map(there, arguments))
        compiled = traced.lower(lowering_platforms=("cuda",)).compile()
    memory = compiled.memory_analysis()
    print(
        f"compiled in {time.perf_counter() - began:.0f} s; scratch {memory.temp_size_in_bytes / 1e9:.2f} GB, "
        f"arguments {memory.argument_size_in_bytes / 1e9:.2f} GB"
    )


LINE = re.compile(r"^( *)(\d+): (k\w+) +\[[^\]]*\] *(\S*)")


def count(text: str, *, show: bool) -> None:
    """Prints what one iteration of the loop over layers launches, from XLA's sequence of thunks.

    A conditional counts as the longest of its branches; each waits for the host. Command buffers are
    CUDA graphs: their kernels are launched together.
    """
    kinds: Counter[str] = Counter()
    branches: dict[int, Counter[str]] = {}
    inside, body_indent, of_branch, branch_indent = False, 0, None, 0
    for line in text.splitlines():
        stripped, indent = line.strip(), len(line) - len(line.lstrip())
        if stripped == "body:":
            inside, body_indent = True, indent
            continue
        if not inside:
            continue
        if indent <= body_indent - 2 and stripped:
            break
        if re.fullmatch(r"branch_\d+:", stripped):
            of_branch, branch_indent = int(stripped[7:-1]), indent
            branches[of_branch] = Counter()
            continue
        found = LINE.match(line)
        if not found:
            continue
        if of_branch is not None and indent <= branch_indent - 2:
            kinds += max(branches.values(), key=lambda c: sum(c.values()))
            of_branch, branches = None, {}
        (kinds if of_branch is None else branches[of_branch])[found[3]] += 1
        if show:
            print(line[:140])
    if of_branch is not None:
        kinds += max(branches.values(), key=lambda c: sum(c.values()))
    graphs, syncs = kinds.pop("kCommandBuffer", 0), kinds.pop("kConditional", 0)
    named = ", ".join(f"{n} {kind[1:]}" for kind, n in kinds.most_common())
    print(
        f"a layer: {sum(kinds.values())} launches ({named}), some in {graphs} CUDA graphs; "
        f"{syncs} waits for the host"
    )


def step(args: argparse.Namespace) -> int:
    with tempfile.TemporaryDirectory(prefix="xla-") as folder:
        dump = f"--xla_dump_to={folder} --xla_dump_hlo_module_re=chunk_step"
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {dump}"
        compile_step(args)
        (path,) = Path(folder).glob("*chunk_step*thunk_sequence_after_thunk_passes.txt")
        count(path.read_text(), show=args.thunks)
    return 0


def batch(args: argparse.Namespace) -> int:
    with as_on_h100():
        return _hopper_batch.run(args, h100())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    table = commands.add_parser("kernels", help="ptxas' report of every kernel")
    table.add_argument("--only", default="", help="cases whose line holds this")
    model = commands.add_parser("step", help="the model's step: memory, and launches per layer")
    model.add_argument("--preset", default="Qwen3-30B-A3B", choices=sorted(bench_prefill.PRESETS))
    model.add_argument("--tokens", type=int, default=2048, help="tokens of a chunk")
    model.add_argument("--sequences", type=int, default=1)
    model.add_argument("--length", type=int, default=4096, help="tokens that the cache holds")
    model.add_argument("--thunks", action="store_true", help="also name every launch")
    slots = commands.add_parser("batch", help="scratch memory of a batch's programs")
    _hopper_batch.add_arguments(slots)
    counting = commands.add_parser("count", help="launches per layer in a dump of XLA's")
    counting.add_argument("file", type=Path)
    counting.add_argument("--thunks", action="store_true")
    args = parser.parse_args()
    if args.command == "count":
        count(args.file.read_text(), show=args.thunks)
        return
    raise SystemExit(bool({"kernels": kernels, "step": step, "batch": batch}[args.command](args)))


if __name__ == "__main__":
    main()
