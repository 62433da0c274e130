"""One of several processes that share a model: what it reads, and what the model gives there, as JSON.

python tests/model/run_in_process.py COORDINATOR COUNT INDEX MESH FILE CHECKPOINT OUT.json
"""

import json
import os
import sys
from pathlib import Path

import jax
import numpy as np

import qwen3_moe_jax as q3
from qwen3_moe_jax.convert import checkpoint_source, gguf_file, manifest
from qwen3_moe_jax.core.sampling import Sampling
from qwen3_moe_jax.jax_backend.runner import JaxRunner
from tests.model.run_on_mesh import NEW_TOKENS, PROMPT, nbytes_of_devices, wrong_rows

PIECE_BYTES = 1024
"""Of the checkpoint, whose arrays are small."""

PROMPTS = [PROMPT, PROMPT[:5], PROMPT[3:12]]


def main() -> None:
    coordinator, count, index, mesh, file, checkpoint, out = sys.argv[1:]
    read = count_reads()
    group = q3.Processes(coordinator, int(count), int(index))
    load = lambda path: q3.load(
        path, backend="jax", mesh=mesh, distributed=group, gate=False, max_context=64, dtype="float32"
    )
    found: dict = {}
    with load(file) as model:
        found["read"] = {"file": sum(read)}
        runner = model.runner
        assert isinstance(runner, JaxRunner)
        found |= results(runner)
        found["wrong rows"] = list(wrong_rows(runner, model.source))
        found["devices"] = [len(jax.local_devices()), len(jax.devices())]
    read.clear()
    with load(checkpoint) as model:
        found["read"]["checkpoint"] = sum(read)
        found["of checkpoint"] = greedy(model.runner)
    found["difference"] = difference(group, file, mesh, int(index))
    Path(out).write_text(json.dumps(found))


def results(runner: JaxRunner) -> dict:
    """What the model gives."""
    forward = runner.forward(PROMPT)
    seeds = [100 + jax.process_index(), 100]  # of which process 0's count
    sample = lambda seed: list(
        runner.stream(PROMPT, max_tokens=NEW_TOKENS, sampling=Sampling(temperature=1.0, seed=seed))
    )
    batch = runner.generate_batch(PROMPTS, max_tokens=NEW_TOKENS, sampling=Sampling(temperature=0))
    return {
        "logits": np.asarray(forward.logits, np.float64).tolist(),
        "expert_ids": forward.expert_ids.tolist(),
        "tokens": greedy(runner),
        "sampled": list(map(sample, seeds)),
        "batch": [one.tokens for one in batch],
        "scores": runner.log_likelihoods(PROMPT).tolist(),
        "mesh": runner.describe()["mesh"],
        "nbytes": nbytes_of_devices(runner),
        "planned": runner.plan.weights,
    }


def greedy(runner) -> list[int]:
    return list(runner.stream(PROMPT, max_tokens=NEW_TOKENS, sampling=Sampling(temperature=0)))


def difference(group: q3.Processes, file: str, mesh: str, index: int) -> str:
    """What is said where processes are asked for different things."""
    try:
        q3.load(file, backend="jax", mesh=mesh, distributed=group, gate=False, max_context=32 + index)
    except ValueError as error:
        return str(error)
    return ""


def count_reads() -> list[int]:
    """Bytes of every read of tensors from now on."""
    read: list[int] = []
    of_file, of_checkpoint = gguf_file.GGUFFile.read_into, checkpoint_source.CheckpointSource._read_piece

    def read_file(self, info, start, raw):
        read.append(len(raw))
        return of_file(self, info, start, raw)

    def read_piece(self, file, index, target, copies):
        read.append(min(PIECE_BYTES, file.nbytes - index * PIECE_BYTES))
        return of_checkpoint(self, file, index, target, copies)

    gguf_file.GGUFFile.read_into = read_file
    checkpoint_source.CheckpointSource._read_piece = read_piece
    return read


if __name__ == "__main__":
    os.environ["QWEN3_MOE_NATIVE"] = "off"
    jax.config.update("jax_platforms", "cpu")
    checkpoint_source.PIECE_BYTES = manifest.PIECE_BYTES = PIECE_BYTES
    main()
