"""Files for the tests of the GGUF reader: what it refuses, random files, sound shards."""

import random
from pathlib import Path

import pytest

from qwen3_moe_jax.convert.errors import ModelFileError
from qwen3_moe_jax.convert.ggml_types import KNOWN_TYPES
from qwen3_moe_jax.convert.gguf_file import GGUFFile
from qwen3_moe_jax.testing.gguf_builder import (
    ARRAY,
    BOOL,
    F32,
    F64,
    I8,
    I16,
    I32,
    I64,
    STRING,
    U8,
    U16,
    U32,
    U64,
    GGUFBuilder,
    Tensor,
    Typed,
)

INTEGERS = {U8: (0, 2**8), I8: (-(2**7), 2**7), U16: (0, 2**16), I16: (-(2**15), 2**15), U32: (0, 2**32)}
INTEGERS |= {I32: (-(2**31), 2**31), U64: (0, 2**64), I64: (-(2**63), 2**63)}


def refusal(path: object, **options: bool) -> ModelFileError:
    with pytest.raises(ModelFileError) as caught:
        GGUFFile.open(path, **options)
    assert str(caught.value).isprintable()
    return caught.value


def random_value(rng: random.Random, kind: int) -> object:
    if kind == STRING:
        return "".join(rng.choices(["a", "é", "漢", "😀", " ", "\n"], k=rng.randrange(20)))
    if kind == BOOL:
        return rng.random() < 0.5
    if kind in (F32, F64):
        return rng.choice([0.0, -1.5, 2.0**-20, float("inf")])
    low, high = INTEGERS[kind]
    return rng.choice([low, high - 1, rng.randrange(low, high)])


def random_file(rng: random.Random, entries: int, tensors: int) -> tuple[GGUFBuilder, dict[str, object]]:
    builder, expected = GGUFBuilder(alignment=rng.choice([1, 8, 32, 4096])), {}
    for i in range(entries):
        kind = rng.randrange(13)
        key = f"key.{i}.{'é' * rng.randrange(3)}"
        if kind == ARRAY:
            kind = rng.choice([k for k in range(13) if k != ARRAY])
            values = [random_value(rng, kind) for _ in range(rng.randrange(40))]
            expected[key], builder.metadata[key] = values, Typed(kind, values)
        else:
            expected[key] = random_value(rng, kind)
            builder.metadata[key] = Typed(kind, expected[key])
    expected["general.alignment"] = builder.metadata["general.alignment"] = builder.alignment
    for i in range(tensors):
        type_id = rng.choice(sorted(KNOWN_TYPES))
        shape = tuple(rng.randrange(4) for _ in range(rng.randrange(4)))
        tensor = Tensor(f"tensor.{i}", (*shape, KNOWN_TYPES[type_id].weights * rng.randrange(3)), type_id)
        tensor.data = rng.randbytes(tensor.nbytes())
        builder.tensors.append(tensor)
    return builder, expected


def sound_shards(count: int = 3, tensors_each: int = 2) -> list[GGUFBuilder]:
    shards = []
    for i in range(count):
        metadata = {"general.architecture": "qwen3moe", "only.in.first": 1} if i == 0 else {}
        metadata["split.no"] = Typed(U16, i)
        metadata["split.count"] = Typed(U16, count)
        metadata["split.tensors.count"] = Typed(I32, count * tensors_each)
        names = [f"t{i}.{j}" for j in range(tensors_each)]
        shards.append(GGUFBuilder(metadata, [Tensor(n, data=n.ljust(16).encode()) for n in names]))
    return shards


def write_shards(folder: Path, shards: list[GGUFBuilder], name: str = "m") -> list[Path]:
    paths = [folder / f"{name}-{i + 1:05}-of-{len(shards):05}.gguf" for i in range(len(shards))]
    for path, shard in zip(paths, shards, strict=True):
        path.write_bytes(shard.build())
    return paths
