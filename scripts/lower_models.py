"""Lowers the whole-model programs of each preset for every NVIDIA target, without a GPU: nothing is compiled.

    python -m scripts.lower_models [--preset NAME ...] [--targets 8.9 9.0] [--tokens 512]

For each model, target and set of kernels: one token of one sequence and of four, and a chunk of a prompt. It
needs neither a plugin nor ptxas. A row says which operations run in kernels of ours, and how many launches of
them a program has (a loop over layers counts once). The last line is JSON; a program that does not lower, or
whose decode step is not the one kernel, ends it with an error.
"""

import argparse
import contextlib
import json
import os
import re
import sys
from collections.abc import Iterator
from unittest import mock

os.environ["JAX_PLATFORMS"] = "cpu"

import jax
import jax.numpy as jnp
from jax.sharding import AbstractDevice, AbstractMesh, use_abstract_mesh

from qwen3_moe_jax.convert.config import PRESETS
from qwen3_moe_jax.convert.tensor_names import q4_k_m_types
from qwen3_moe_jax.jax_backend.decode_path import PATHS, Decoder
from qwen3_moe_jax.jax_backend.kv_cache import KVCache
from qwen3_moe_jax.jax_backend.model import Qwen3Moe
from qwen3_moe_jax.jax_backend.params import GPU_ROLES, abstract_params, tiled_params
from qwen3_moe_jax.kernels_pallas.attention import kernel_sm90 as attention
from qwen3_moe_jax.kernels_pallas.decode_step import api
from qwen3_moe_jax.kernels_pallas.gpu import cards, device
from qwen3_moe_jax.kernels_pallas.implementations import recording

MODELS = ("Qwen3-30B-A3B", "Qwen3-235B-A22B", "Qwen3-Coder-480B-A35B")
CACHE_TOKENS = 1024
LAUNCH = re.compile(r"custom_call @mosaic_gpu")


@contextlib.contextmanager
def as_on(target: cards.Capability, kernels: str) -> Iterator[None]:
    """The ops believe in a card of this capability, and Mosaic makes code for it."""
    name, cores = next(iter(target.multiprocessors.items()))
    grid = api.Device.of_cores(cores, kernels=kernels, shared_memory=target.shared_memory)
    named = AbstractDevice(device_kind=name, num_cores=cores, platform="gpu")
    with contextlib.ExitStack() as patches:
        for where in (device, attention):
            patches.enter_context(mock.patch.object(where, "require_hopper", return_value=None))
        patches.enter_context(mock.patch.object(device, "require_ampere", return_value=None))
        patches.enter_context(mock.patch.object(api.Device, "of", return_value=grid))
        infer = "jax.experimental.mosaic.gpu.utils._infer_arch"
        patches.enter_context(mock.patch(infer, return_value=target.number))
        patches.enter_context(use_abstract_mesh(AbstractMesh((), (), abstract_device=named)))
        yield


def lowered(preset: str, target: cards.Capability, kernels: str, batch: int, tokens: int) -> dict:
    """One row: a program of ``batch`` sequences and ``tokens`` of each."""
    config = PRESETS[preset]
    decoder = Decoder(Qwen3Moe(config, jnp.dtype(jnp.bfloat16), kernels=kernels), PATHS)
    params = tiled_params(abstract_params(config, q4_k_m_types(config), GPU_ROLES))
    cache = jax.eval_shape(lambda: KVCache.create(config, batch, CACHE_TOKENS, jnp.float16))
    ids = jax.ShapeDtypeStruct((batch, tokens), jnp.int32)
    start = jax.ShapeDtypeStruct((batch,), jnp.int32)
    step = jax.jit(lambda *arguments: decoder.read(*arguments).logits)
    with as_on(target, kernels), recording() as record:
        text = step.trace(params, ids, start, cache).lower(lowering_platforms=("cuda",)).as_text()
    ran = sorted({f"{r.op}: {r.implementation}" for r in record})
    row = {"preset": preset, "target": target.target, "kernels": kernels, "batch": batch, "tokens": tokens}
    return row | {"launches": len(LAUNCH.findall(text)), "ran": ran}


def rows_of(args: argparse.Namespace) -> Iterator[dict]:
    """All rows, as they are lowered."""
    for version in args.targets:
        target = cards.capabilities()[version]
        for kernels in ("hopper", "portable") if version == "9.0" else ("portable",):
            for preset in args.preset:
                for batch, tokens in ((1, 1), (4, 1), (1, args.tokens)):
                    yield lowered(preset, target, kernels, batch, tokens)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--preset", nargs="+", default=list(MODELS), choices=sorted(PRESETS))
    parser.add_argument("--targets", nargs="+", default=sorted(cards.capabilities()), metavar="CAPABILITY")
    parser.add_argument("--tokens", type=int, default=512, help="of a chunk of a prompt")
    args = parser.parse_args()
    rows, faults = [], []
    for row in rows_of(args):
        rows.append(row)
        print(f"{row['target']:8} {row['kernels']:8} {row['preset']:22} {row['batch']} x {row['tokens']:<4} "
              f"{row['launches']:3} launches  {', '.join(row['ran'])}", flush=True)  # fmt: skip
        if row["tokens"] == 1 and f"decode_step: {row['kernels']}" not in row["ran"]:
            faults.append(f"{row['preset']} on {row['target']}, {row['batch']}: decoding is not one kernel")
    print(json.dumps({"jax": jax.__version__, "programs": rows, "faults": faults}))
    sys.exit("; ".join(faults) or 0)


if __name__ == "__main__":
    main()
