"""A process with eight simulated devices: what models give when they are split, as arrays and JSON.

python tests/model/run_on_mesh.py FILE ARRAYS.npz
"""

import json
import os
import sys
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import jax
import numpy as np

from qwen3_moe_jax.convert.layouts.gpu_tiles import to_gpu_tiles
from qwen3_moe_jax.convert.open_model import open_model
from qwen3_moe_jax.convert.packed import LANES, PackedTensor
from qwen3_moe_jax.convert.source import ModelSource
from qwen3_moe_jax.core.sampling import Sampling
from qwen3_moe_jax.core.stages import STAGES
from qwen3_moe_jax.jax_backend import programs
from qwen3_moe_jax.jax_backend.host_load import flat
from qwen3_moe_jax.jax_backend.params import is_tiled, split_path
from qwen3_moe_jax.jax_backend.runner import JaxRunner
from qwen3_moe_jax.jax_backend.sharded_params import load_sharded, on_device, read_parts
from qwen3_moe_jax.jax_backend.sharding import MeshShape, Shards
from qwen3_moe_jax.kernels_pallas.packed.stacks import rows_per_unit
from qwen3_moe_jax.loader import embedded_model, make_runner

PROMPT = [int(i) for i in np.random.default_rng(0).integers(0, 250, 21)]
SHAPES = ("tp=1,ep=1", "tp=2,ep=1", "tp=1,ep=4", "tp=2,ep=4")
SEEN = ("tp=1,ep=1", "tp=2,ep=4")
"""Those of which all stages are wanted."""
WRITES = "tp=2,ep=4"
"""The one that writes: each program takes seconds to compile."""
EMBEDDED = "tp=1,ep=2"
"""All that the embedded model allows: a row of its o_proj has two superblocks."""
NEW_TOKENS = 6


def main() -> None:
    """Prints one object, and writes logits and stages to a file."""
    path, arrays_path = sys.argv[1:]
    found: dict[str, Any] = {}
    arrays: dict[str, np.ndarray] = {}
    with open_model(path) as source, open_model(embedded_model()) as embedded:
        for text in SHAPES:
            found[text], its = results(source, text, seen=text in SEEN, writes=text == WRITES)
            arrays |= {f"{text} {name}": value for name, value in its.items()}
        found["embedded"], its = results(embedded, EMBEDDED)
        arrays |= {f"embedded {name}": value for name, value in its.items()}
        found["tiles"] = list(wrong_tiles(embedded))
    np.savez(arrays_path, **arrays)
    print(json.dumps(found))


def results(source: ModelSource, text: str, *, seen: bool = False, writes: bool = False) -> tuple[dict, dict]:
    """Facts of one model on one mesh; its logits and stages."""
    made: list[str] = []
    remove = programs.listen(lambda name, how: made.append(name) if how else None)
    first = {"first_prompt": len(PROMPT)} if writes else {}
    runner = make_runner(source, "jax", mesh=text, max_context=64, dtype="float32", **first)
    assert isinstance(runner, JaxRunner)
    forward = runner.forward(PROMPT, capture=frozenset(STAGES) if seen else ())
    facts = {
        "expert_ids": forward.expert_ids.tolist(),
        "describe": {name: runner.describe().get(name) for name in ("mesh", "decode", "kernels_reason")},
        "planned": runner.plan.weights,
        "nbytes": nbytes_of_devices(runner),
    }
    if writes:
        stream = runner.stream(PROMPT, max_tokens=NEW_TOKENS, sampling=Sampling(temperature=0.0))
        facts["tokens"] = list(stream)
        facts["wrong rows"] = list(wrong_rows(runner, source))
        facts["made"] = made
    runner.close()
    remove()
    stages = {f"{name} {layer}": np.asarray(value) for (name, layer), value in forward.stages.items()}
    return facts, {"logits": forward.logits, **stages}


def nbytes_of_devices(runner: JaxRunner) -> list[int]:
    """Bytes of weights on each device."""
    held: dict[int, int] = {}
    for leaf in jax.tree.leaves(runner.params):
        for shard in leaf.addressable_shards:
            held[shard.device.id] = held.get(shard.device.id, 0) + shard.data.nbytes
    return [held[device] for device in sorted(held)]


def wrong_rows(runner: JaxRunner, source: ModelSource) -> Iterator[str]:
    """Tensors of which the runner does not give back the file's weights."""
    from qwen3_moe_jax.convert.unpack import dequantize

    for path in ("layers.1.self_attn.k_proj", "layers.1.self_attn.o_proj", "layers.1.mlp.experts.down_proj"):
        whole = dequantize(source.tensor(path))
        expert = 5 if whole.ndim == 3 else None
        rows = (whole if expert is None else whole[expert])[3 * LANES : 4 * LANES]
        if not np.array_equal(runner.dequantized(path, 3, expert), rows):
            yield path


def wrong_tiles(source: ModelSource) -> Iterator[str]:
    """Tensors that are not what a GPU of a mesh has to hold: its part, in tiles."""
    shards = Shards.of(MeshShape.parse(EMBEDDED), source.config, jax.devices())
    params = load_sharded(source, shards, SimpleNamespace(platform="gpu"))
    for path in source.paths():
        for index, part in read_parts(source, shards, path).items():
            layer, _ = split_path(path)
            expected = part if layer is None else flat(part)
            stack, first = on_device(params, shards.devices[index], path)
            if is_tiled(stack):
                expected = to_gpu_tiles(expected, np)
            unit = rows_per_unit(stack.layout) if isinstance(stack, PackedTensor) else 1
            for has, wants in zip(jax.tree.leaves(stack), jax.tree.leaves(expected), strict=True):
                begin = first // unit
                if not np.array_equal(np.asarray(has)[begin : begin + len(wants)], wants):
                    yield f"{path} of device {index}"


if __name__ == "__main__":
    os.environ["QWEN3_MOE_NATIVE"] = "off"
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", 8)
    main()
