"""The limit that memory bandwidth sets on decoding: bytes that one token reads, and what devices move."""

from qwen3_moe_jax.convert.ggml_types import BLOCK_FORMATS
from qwen3_moe_jax.convert.model_source import ModelSource

PEAK_BYTES_PER_SECOND = {
    "H200": 4.8e12,
    "H100 PCIe": 2.0e12,
    "H100 NVL": 3.9e12,
    "H100": 3.35e12,
    "A100-SXM4-80GB": 2.039e12,
    "A100": 1.555e12,
    "L40S": 0.864e12,
    "L40": 0.864e12,
    "L4": 0.3e12,
    "RTX 5090": 1.792e12,
    "RTX 4090": 1.008e12,
    "RTX 3090": 0.936e12,
}
"""By part of the device's name, the more particular first; from NVIDIA's data sheets."""


def peak_bandwidth(device: str) -> float | None:
    """Bytes a second that a device's memory moves, or None for one that is not in the table."""
    return next((peak for name, peak in PEAK_BYTES_PER_SECOND.items() if name in device), None)


def bytes_per_token(source: ModelSource, sequences: int = 1) -> float:
    """Bytes of weights that decoding one token of each sequence reads, in the file's own form.

    Every matrix but the embedding, and of the experts the share that a token chooses; or the share
    that several sequences can be expected to choose together, if routing is even.
    """
    config = source.config
    used = 1 - (1 - config.num_experts_per_tok / config.num_experts) ** sequences
    total = 0.0
    for path, spec in source.specs.items():
        block = BLOCK_FORMATS[source.types[path]]
        weights = 1.0
        for size in spec.shape:
            weights *= size
        if path == "embed_tokens" and not config.tie_word_embeddings:
            weights = spec.shape[-1] * sequences
        share = used if ".experts." in path else 1.0
        total += share * weights / block.weights * block.nbytes
    return total
