"""Qwen3-MoE GGUF files of any size with random weights, ordinary or strange.

A file has the tensors, shapes and types of a real one (llama.cpp's Q4_K_M
recipe by default), and scales chosen so that activations stay sane, so it
measures what a real file measures. Blocks are drawn from a pool of random ones:
the full size of Qwen3-30B-A3B (18.6 GB) takes about as long as the disk.

``Style`` asks for weights that strain arithmetic: means of many standard
deviations, constant blocks, terms that cancel, random bytes, extreme scales.
"""

import os
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import BinaryIO

import numpy as np

from qwen3_moe_jax.convert.config import ARCHITECTURE, PRESETS, Qwen3MoeConfig
from qwen3_moe_jax.convert.ggml_types import BLOCK_FORMATS, GGMLType
from qwen3_moe_jax.convert.gguf_file import GGUFFile
from qwen3_moe_jax.convert.tensor_names import TensorSpec, tensor_specs
from qwen3_moe_jax.testing import low_bits
from qwen3_moe_jax.testing.mixes import mix_types

ALIGNMENT = 32
WEIGHT_STD = 0.02
ROUTER_STD = 0.05
NORM_STD = 0.1
FLOAT16_MAX = 65504.0
_POOL_BYTES = 32 << 20
_FLOATS = (GGMLType.F32, GGMLType.F16, GGMLType.BF16)

SMALL = replace(
    PRESETS["Qwen3-30B-A3B"],
    vocab_size=272,
    hidden_size=256,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=64,
    num_experts=3,
    num_experts_per_tok=2,
    moe_intermediate_size=256,
)
"""A model of a few megabytes, for tests and checks: every matrix row is one superblock."""

# GGUF value types: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
_UINT32, _INT32, _FLOAT32, _BOOL, _STRING, _ARRAY = 4, 5, 6, 7, 8, 9


def write_random_gguf(
    path: str | os.PathLike,
    config: Qwen3MoeConfig,
    *,
    mix: str = "q4_k_m",
    types: Mapping[str, GGMLType] | None = None,
    tokenizer: Mapping[str, object] | None = None,
    seed: int = 0,
    style: "Style | None" = None,
    metadata: Mapping[str, object] | None = None,
) -> None:
    """Writes one file.

    Args:
      path: where; overwritten.
      config: sizes; ``tie_word_embeddings`` leaves ``output.weight`` out.
      mix: what :func:`~qwen3_moe_jax.testing.mixes.mix_types` takes.
      types: types of single tensors by parameter path, over ``mix``.
      tokenizer: the ``tokenizer.*`` metadata; None for a byte-level vocabulary.
      seed: of every random number.
      style: what the weights are like; None for ordinary ones.
      metadata: further keys, over those of the config.
    """
    style = style or Style()
    rng = np.random.default_rng(seed)
    specs = tensor_specs(config)
    chosen = {**mix_types(mix, config), **(types or {})}
    tokenizer = byte_level_tokenizer(config.vocab_size) if tokenizer is None else tokenizer
    with open(path, "wb") as file:
        file.write(_header({**_metadata(config, tokenizer), **(metadata or {})}, specs, chosen))
        pools: dict[GGMLType, np.ndarray] = {}
        for spec in specs:
            _pad(file)
            _write_tensor(file, spec, chosen[spec.path], pools, rng, style)
        _pad(file)


def byte_level_tokenizer(vocab_size: int) -> dict[str, object]:
    """A GPT-2 style vocabulary: 256 bytes, a few merges, three control tokens, padding.

    Raises:
      ValueError: ``vocab_size`` has no room for them.
    """
    merges = ["h e", "Ġ t", "i n", "Ġt he"]
    tokens = [*_byte_characters(), *(merge.replace(" ", "") for merge in merges)]
    control = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    padding = vocab_size - len(tokens) - len(control)
    if padding < 0:
        raise ValueError(
            f"the vocabulary needs {len(tokens) + len(control)} tokens or more, not {vocab_size}"
        )
    first = len(tokens)
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "qwen2",
        "tokenizer.ggml.tokens": [*tokens, *control, *(f"[PAD{i}]" for i in range(padding))],
        "tokenizer.ggml.token_type": [1] * first + [3] * len(control) + [5] * padding,
        "tokenizer.ggml.merges": merges,
        "tokenizer.ggml.eos_token_id": first + 2,
        "tokenizer.ggml.padding_token_id": first,
        "tokenizer.ggml.add_bos_token": False,
    }


def tokenizer_of(path: str | os.PathLike) -> dict[str, object]:
    """The ``tokenizer.*`` metadata of a GGUF file."""
    with GGUFFile.open(path) as file:
        return {key: value for key, value in file.metadata.items() if key.startswith("tokenizer.")}


def _byte_characters() -> list[str]:
    """GPT-2's printable stand-in for every byte (``bytes_to_unicode`` of its encoder)."""
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    moved = [byte for byte in range(256) if byte not in plain]
    table = {byte: chr(byte) for byte in plain} | {byte: chr(256 + i) for i, byte in enumerate(moved)}
    return [table[byte] for byte in range(256)]


def _metadata(config: Qwen3MoeConfig, tokenizer: Mapping[str, object]) -> dict[str, object]:
    values = {
        "block_count": config.num_hidden_layers,
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "feed_forward_length": config.moe_intermediate_size * config.num_experts_per_tok,
        "expert_feed_forward_length": config.moe_intermediate_size,
        "expert_count": config.num_experts,
        "expert_used_count": config.num_experts_per_tok,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.key_length": config.head_dim,
        "attention.value_length": config.head_dim,
        "attention.layer_norm_rms_epsilon": config.rms_norm_eps,
        "rope.freq_base": config.rope_theta,
    }
    if config.rope_scaling is not None:
        values["rope.scaling.type"] = config.rope_scaling.type
        values["rope.scaling.factor"] = config.rope_scaling.factor
        values["rope.scaling.original_context_length"] = config.rope_scaling.original_max_position_embeddings
    return {
        "general.architecture": ARCHITECTURE,
        "general.name": "random-qwen3moe",
        "general.alignment": ALIGNMENT,
        **{f"{ARCHITECTURE}.{key}": value for key, value in values.items()},
        **tokenizer,
    }


def _string(text: str) -> bytes:
    encoded = text.encode()
    return struct.pack("<Q", len(encoded)) + encoded


def _value(value: object) -> tuple[int, bytes]:
    """The GGUF type and the bytes of one metadata value."""
    if isinstance(value, bool):
        return _BOOL, struct.pack("<?", value)
    if isinstance(value, int):
        return (_UINT32, struct.pack("<I", value)) if value >= 0 else (_INT32, struct.pack("<i", value))
    if isinstance(value, float):
        return _FLOAT32, struct.pack("<f", value)
    if isinstance(value, str):
        return _STRING, _string(value)
    if isinstance(value, list):
        return _ARRAY, _array(value)
    raise TypeError(f"no GGUF type for {type(value).__name__}")


def _array(values: list) -> bytes:
    if all(isinstance(v, str) for v in values):
        return struct.pack("<IQ", _STRING, len(values)) + b"".join(map(_string, values))
    if all(isinstance(v, int) for v in values):
        return struct.pack("<IQ", _INT32, len(values)) + np.array(values, "<i4").tobytes()
    return struct.pack("<IQ", _FLOAT32, len(values)) + np.array(values, "<f4").tobytes()


def _header(metadata: Mapping[str, object], specs: list[TensorSpec], types: Mapping[str, GGMLType]) -> bytes:
    parts = [struct.pack("<4sIQQ", b"GGUF", 3, len(specs), len(metadata))]
    for key, value in metadata.items():
        kind, data = _value(value)
        parts += [_string(key), struct.pack("<I", kind), data]
    offset = 0
    for spec in specs:
        kind = types[spec.path]
        dims = spec.shape[::-1]
        parts.append(_string(spec.gguf_name))
        parts.append(struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, kind, offset))
        offset += -(-tensor_nbytes(spec.shape, kind) // ALIGNMENT) * ALIGNMENT
    return b"".join(parts)


def tensor_nbytes(shape: tuple[int, ...], kind: GGMLType) -> int:
    """Bytes of a tensor in a file."""
    *rows, length = shape
    return int(np.prod(rows, dtype=np.int64)) * BLOCK_FORMATS[kind].row_nbytes(length)


def _pad(file: BinaryIO) -> None:
    file.write(bytes(-file.tell() % ALIGNMENT))


def _write_tensor(
    file: BinaryIO,
    spec: TensorSpec,
    kind: GGMLType,
    pools: dict[GGMLType, np.ndarray],
    rng: np.random.Generator,
    style: "Style",
) -> None:
    if len(spec.shape) == 1:
        file.write(_floats(style.norm_scale * (1 + NORM_STD * rng.standard_normal(spec.shape)), kind))
        return
    if spec.path.endswith("mlp.router") and kind == GGMLType.F32 and style == Style():
        file.write(_floats(ROUTER_STD * rng.standard_normal(spec.shape), kind))
        return
    nbytes = BLOCK_FORMATS[kind].nbytes
    remaining = tensor_nbytes(spec.shape, kind) // nbytes
    if spec.path.endswith("mlp.router"):  # a pool has rows twice, whose experts would tie
        file.write(style.blocks(kind, remaining, rng).data)
        return
    size = min(_POOL_BYTES // nbytes, remaining)
    if kind not in pools or len(pools[kind]) < size:
        pools[kind] = style.blocks(kind, size, rng)
    pool = pools[kind]
    while remaining:
        start = int(rng.integers(0, len(pool)))
        count = min(len(pool) - start, remaining)
        file.write(pool[start : start + count].data)
        remaining -= count


def random_blocks(
    kind: GGMLType, count: int, rng: np.random.Generator, std: float = WEIGHT_STD, mean: float = 0.0
) -> np.ndarray:
    """Random blocks of one type.

    Args:
      kind: the type.
      count: how many blocks.
      rng: source of random numbers.
      std: about the standard deviation of the weights.
      mean: of the weights, in standard deviations of those that share a scale. Types with a minimum
        reach any, Q6_K and Q8_0 narrow their quants to the end of their range, and the other ones
        that are symmetric stay at zero.

    Returns:
      uint8 [count, bytes of one block].
    """
    fmt = BLOCK_FORMATS[kind]
    if kind in _FLOATS:
        values = std * (mean + rng.standard_normal(count, dtype=np.float32))
        return np.frombuffer(_floats(values, kind), np.uint8).reshape(count, fmt.nbytes)
    blocks = rng.integers(0, 256, (count, fmt.nbytes), dtype=np.uint8)
    if kind == GGMLType.Q8_0:
        spread = 73.9  # the standard deviation of a uniform int8
        if mean:
            low, high, spread = _quant_range(mean, 128)
            _set(blocks, kind, "q", rng.integers(low, high, (count, 32)))
        _set(blocks, kind, "d", std / spread)
    elif kind == GGMLType.Q6_K:
        spread = 18.5
        if mean:
            low, high, spread = _quant_range(mean, 32)
            _set_q6_k(blocks, rng.integers(low, high, (count, 256)) + 32)
        _set(blocks, kind, "scales", rng.integers(20, 60, (count, 16)))
        _set(blocks, kind, "d", std / (40 * spread))
    elif kind not in (GGMLType.Q4_K, GGMLType.Q5_K):
        low_bits.randomize(blocks, kind, std, mean, rng)
    else:
        # Mins equal to scales, and dmin half the range of q where weights are centred on zero.
        levels = 16 if kind == GGMLType.Q4_K else 32
        spread = levels / 12**0.5
        _set(blocks, kind, "scales", _six_bit_scales(rng.integers(20, 60, (count, 8), dtype=np.uint8)))
        d = np.float16(std / (40 * spread))
        _set(blocks, kind, "d", d)
        _set(blocks, kind, "dmin", d * np.float16((levels - 1) / 2 - mean * spread))
    return blocks


def constant_blocks(
    kind: GGMLType, count: int, rng: np.random.Generator, std: float = WEIGHT_STD
) -> np.ndarray:
    """Blocks all of whose weights are one number, which differs from block to block.

    In types with a minimum it is a small difference of two large terms.
    """
    fmt = BLOCK_FORMATS[kind]
    if kind in _FLOATS:  # a block is one weight: runs of 256 are alike
        values = np.repeat(std * rng.standard_normal(-(-count // 256), dtype=np.float32), 256)[:count]
        return np.frombuffer(_floats(values, kind), np.uint8).reshape(count, fmt.nbytes)
    blocks = np.zeros((count, fmt.nbytes), np.uint8)
    if kind == GGMLType.Q8_0:
        _set(blocks, kind, "q", rng.integers(-127, 128, (count, 1)))
        _set(blocks, kind, "d", std / 73)
        return blocks
    if kind == GGMLType.Q6_K:
        _set_q6_k(blocks, np.repeat(rng.integers(0, 64, (count, 1)), 256, axis=1))
        _set(blocks, kind, "scales", 40)
        _set(blocks, kind, "d", std / (40 * 18))
        return blocks
    if kind not in (GGMLType.Q4_K, GGMLType.Q5_K):
        low_bits.make_constant(blocks, kind, std, rng)
        return blocks
    blocks[:, fmt.fields["q"].offset :] = rng.integers(12, 16, (count, 1), dtype=np.uint8) * 0x11
    _set(blocks, kind, "scales", _six_bit_scales(np.full((count, 8), 40, np.uint8)))
    _set(blocks, kind, "d", std / 40)
    _set(blocks, kind, "dmin", std / 40 * (13.5 + 0.1 * rng.standard_normal((count, 1))))
    return blocks


def raw_blocks(kind: GGMLType, count: int, rng: np.random.Generator) -> np.ndarray:
    """Random bytes; scales, and weights that are numbers themselves, that are not finite are made finite."""
    fmt = BLOCK_FORMATS[kind]
    blocks = rng.integers(0, 256, (count, fmt.nbytes), dtype=np.uint8)
    for field in fmt.fields.values():
        mask = {"<f2": 0x4000, "<f4": 0x40000000}.get(field.dtype)
        mask = 0x4000 if kind == GGMLType.BF16 else mask
        if mask:  # the exponent's top bit cleared: magnitudes below 2
            part = blocks[:, field.offset : field.offset + field.nbytes]
            bits = part.view(f"<u{field.nbytes}")
            bits &= np.array(2 ** (8 * field.nbytes) - 1 - mask, bits.dtype)
    if kind in (GGMLType.IQ1_M, GGMLType.MXFP4):
        scales = rng.uniform(-2, 2, count)
        low_bits.set_scale(blocks, kind, low_bits.scale_name(kind), scales)
    return blocks


@dataclass(frozen=True)
class Style:
    """What the weights of a file are like.

    Attributes:
      blocks: makes the matrices' blocks of a type.
      norm_scale: what the norms' weights are about.
    """

    blocks: Callable[[GGMLType, int, np.random.Generator], np.ndarray] = random_blocks
    norm_scale: float = 1.0


def shifted(mean: float, std: float = WEIGHT_STD) -> Style:
    """Weights of this mean, in standard deviations."""
    return Style(partial(random_blocks, std=std, mean=mean))


def _quant_range(mean: float, end: int) -> tuple[int, int, float]:
    """Integers [low, high) up to ``end``, or down to ``-end``: uniform ones have about this mean.

    Returns:
      low, high, and the numbers' standard deviation; ``mean`` counts in it.
    """
    # Uniform over [a, end): mean (a + end) / 2, deviation (end - a) / sqrt(12).
    share = 12**0.5 / 2 / abs(mean)
    near = min(max(round(end * (1 - share) / (1 + share)), 1 - end), end - 2)
    spread = (end - near) / 12**0.5
    return (near, end, spread) if mean > 0 else (1 - end, 1 - near, spread)


def _set_q6_k(blocks: np.ndarray, quants: np.ndarray) -> None:
    """Quants 0 to 63 [count, 256] as ``block_q6_K`` spreads them over low and high bits."""
    groups = quants.astype(np.uint8).reshape(-1, 2, 4, 32)
    low, high = groups & 15, groups >> 4
    ql = np.concatenate([low[:, :, 0] | low[:, :, 2] << 4, low[:, :, 1] | low[:, :, 3] << 4], axis=-1)
    qh = high[:, :, 0] | high[:, :, 1] << 2 | high[:, :, 2] << 4 | high[:, :, 3] << 6
    _set(blocks, GGMLType.Q6_K, "ql", ql.reshape(-1, 128))
    _set(blocks, GGMLType.Q6_K, "qh", qh.reshape(-1, 64))


def _set(blocks: np.ndarray, kind: GGMLType, name: str, values: object) -> None:
    field = BLOCK_FORMATS[kind].fields[name]
    blocks[:, field.offset : field.offset + field.nbytes].view(field.dtype)[...] = values


def _six_bit_scales(scales: np.ndarray) -> np.ndarray:
    """The 12 bytes of Q4_K's scales and mins, both equal to ``scales`` [count, 8]."""
    low = (scales[:, :4] & 0x3F) | (scales[:, 4:] >> 4 << 6)
    high = (scales[:, 4:] & 0x0F) * np.uint8(0x11)
    return np.concatenate([low, low, high], axis=1)


def _floats(values: np.ndarray, kind: GGMLType) -> bytes:
    if kind == GGMLType.BF16:
        return (values.astype("<f4").view("<u4") >> 16).astype("<u2").tobytes()
    if kind == GGMLType.F16:
        return np.clip(values, -FLOAT16_MAX, FLOAT16_MAX).astype("<f2").tobytes()
    return values.astype("<f4").tobytes()
