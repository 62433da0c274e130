"""What ships with the package to verify against: a text, and logits of an independent implementation."""

import hashlib
from dataclasses import dataclass
from importlib.resources import files

import numpy as np

from qwen3_moe_jax.convert.source import ModelSource

TEXT_NAME = "parity-text.txt"
LOGITS_NAME = "tiny-coder-logits.npz"

MAX_FINGERPRINTED_BYTES = 64 << 20
"""Recorded logits are of a small model; a larger one is not read to find out."""


@dataclass(frozen=True)
class RecordedLogits:
    """Logits of one prompt from Hugging Face Transformers' Qwen3-MoE in float32.

    Attributes:
      token_ids: the whole prompt.
      positions: which rows were kept.
      logits: float32 [positions, V].
    """

    token_ids: np.ndarray
    positions: np.ndarray
    logits: np.ndarray


def parity_text() -> str:
    """Python source and prose of this project, a snapshot that does not change with it."""
    return (files("qwen3_moe_jax") / "assets" / TEXT_NAME).read_text()


def fingerprint(source: ModelSource) -> str:
    """SHA-256 over all packed weights: the same for a GGUF file and for its packed checkpoint."""
    digest = hashlib.sha256()
    for path, tensor in source.tensors():
        digest.update(f"{path} {tensor.type.name} {tensor.shape}\n".encode())
        for name, array in tensor.arrays.items():
            digest.update(name.encode())
            digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest()


def recorded_logits(source: ModelSource) -> list[RecordedLogits]:
    """The recordings made of exactly these weights; empty for any other model."""
    if source.nbytes > MAX_FINGERPRINTED_BYTES:
        return []
    with (
        (files("qwen3_moe_jax") / "assets" / LOGITS_NAME).open("rb") as file,
        np.load(file, allow_pickle=False) as data,
    ):
        if str(data["fingerprint"]) != fingerprint(source):
            return []
        return [
            RecordedLogits(data[f"ids{i}"], data[f"positions{i}"], data[f"logits{i}"])
            for i in range(int(data["prompts"]))
        ]
