"""A tiny GGUF writer for tests, in memory, that can also write what no writer should.

Every length, count, type and offset can be overridden, so a test states only
what is wrong with its file. Layout: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

import struct
from dataclasses import dataclass, field

from qwen3_moe_jax.convert.config import Qwen3MoeConfig, RopeScaling
from qwen3_moe_jax.convert.ggml_types import KNOWN_TYPES, GGMLType
from qwen3_moe_jax.convert.tensor_names import TensorSpec, tensor_specs
from qwen3_moe_jax.convert.tokenizer_metadata import BYTE_ALPHABET

U8, I8, U16, I16, U32, I32, F32, BOOL, STRING, ARRAY, U64, I64, F64 = range(13)
_CODES = {U8: "B", I8: "b", U16: "H", I16: "h", U32: "I", I32: "i", F32: "f", BOOL: "B", U64: "Q", I64: "q"}
_CODES[F64] = "d"

TINY = Qwen3MoeConfig(
    vocab_size=264,
    hidden_size=32,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    num_experts=3,
    num_experts_per_tok=2,
    moe_intermediate_size=32,
    rms_norm_eps=1e-6,
    rope_theta=1e6,
    max_position_embeddings=64,
)
"""A whole model in about 110 KB of F32."""


@dataclass(frozen=True)
class Typed:
    """A metadata value with an explicit GGUF type; for an array, the type of its elements."""

    type: int
    value: object


def text(value: str | bytes, length: int | None = None) -> bytes:
    raw = value.encode() if isinstance(value, str) else value
    return struct.pack("<Q", len(raw) if length is None else length) + raw


def _type_of(value: object) -> int:
    kinds = {bool: BOOL, int: U32, float: F32, str: STRING, bytes: STRING}
    return kinds[type(value)]


def encode_value(value: object) -> bytes:
    """Type id and payload of a metadata value: Python's own types, lists of one, or :class:`Typed`."""
    kind = None
    if isinstance(value, Typed):
        kind, value = value.type, value.value
    if isinstance(value, list):
        kind = _type_of(value[0]) if kind is None else kind
        return struct.pack("<IIQ", ARRAY, kind, len(value)) + _payload(kind, value)
    kind = _type_of(value) if kind is None else kind
    return struct.pack("<I", kind) + _payload(kind, [value])


def _payload(kind: int, values: list) -> bytes:
    if kind == STRING:
        return b"".join(map(text, values))
    return struct.pack(f"<{len(values)}{_CODES[kind]}", *values)


@dataclass
class Tensor:
    """One tensor to write: ``shape`` in C order; None means "what is right" for every other field."""

    name: str | bytes
    shape: tuple[int, ...] = (4,)
    type: int = GGMLType.F32
    data: bytes | None = None
    dims: tuple[int, ...] | None = None
    n_dims: int | None = None
    name_length: int | None = None
    offset: int | None = None

    def nbytes(self) -> int:
        size = KNOWN_TYPES[self.type]
        count = 1
        for n in self.shape:
            count *= n
        return count // size.weights * size.nbytes

    def payload(self) -> bytes:
        return bytes(self.nbytes()) if self.data is None else self.data

    def info(self, offset: int) -> bytes:
        dims = self.shape[::-1] if self.dims is None else self.dims
        return (
            text(self.name, self.name_length)
            + struct.pack("<I", len(dims) if self.n_dims is None else self.n_dims)
            + b"".join(struct.pack("<Q", d % 2**64) for d in dims)
            + struct.pack("<iQ", self.type, (offset if self.offset is None else self.offset) % 2**64)
        )


@dataclass
class GGUFBuilder:
    """A GGUF file in parts. ``metadata`` and ``tensors`` may be changed before :meth:`build`.

    Attributes:
      metadata: key to value (see :func:`encode_value`).
      raw_metadata: whole entries as bytes, written after ``metadata`` and counted.
      alignment: how tensor data is laid out; say it in ``metadata`` too if it is not 32.
      tail_padding: pad after the last tensor, as a sound file does.
    """

    metadata: dict[str, object] = field(default_factory=dict)
    tensors: list[Tensor] = field(default_factory=list)
    raw_metadata: list[bytes] = field(default_factory=list)
    magic: bytes = b"GGUF"
    version: int = 3
    alignment: int = 32
    n_kv: int | None = None
    n_tensors: int | None = None
    tail_padding: bool = True
    with_data: bool = True

    def header(self) -> bytes:
        entries = [text(key) + encode_value(value) for key, value in self.metadata.items()]
        entries += self.raw_metadata
        n_tensors = len(self.tensors) if self.n_tensors is None else self.n_tensors
        n_kv = len(entries) if self.n_kv is None else self.n_kv
        out = [self.magic, struct.pack("<IQQ", self.version, n_tensors, n_kv), *entries]
        offset = 0
        for tensor in self.tensors:
            out.append(tensor.info(offset))
            offset = self._round_up(offset + len(tensor.payload()))
        return b"".join(out)

    def build(self) -> bytes:
        out = bytearray(self.header())
        if not self.tensors or not self.with_data:
            return bytes(out)
        for tensor in self.tensors:
            out += bytes(self._round_up(len(out)) - len(out))
            out += tensor.payload()
        if self.tail_padding:
            out += bytes(self._round_up(len(out)) - len(out))
        return bytes(out)

    def _round_up(self, value: int) -> int:
        return -(-value // self.alignment) * self.alignment


def entry(key: str | bytes, type: int, payload: bytes, key_length: int | None = None) -> bytes:
    """One metadata entry of any bytes, for ``GGUFBuilder.raw_metadata``."""
    return text(key, key_length) + struct.pack("<I", type) + payload


def array(element: int, count: int, payload: bytes = b"") -> bytes:
    """The payload of an array whose declared count may be a lie."""
    return struct.pack("<IQ", element, count) + payload


def model_metadata(config: Qwen3MoeConfig = TINY) -> dict[str, object]:
    """Metadata of a model, hyper-parameters alone."""
    values: dict[str, object] = {
        "block_count": config.num_hidden_layers,
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.key_length": config.head_dim,
        "attention.value_length": config.head_dim,
        "attention.layer_norm_rms_epsilon": config.rms_norm_eps,
        "rope.freq_base": config.rope_theta,
        "expert_count": config.num_experts,
        "expert_used_count": config.num_experts_per_tok,
        "expert_feed_forward_length": config.moe_intermediate_size,
    }
    values |= _rope_scaling_metadata(config.rope_scaling)
    return {"general.architecture": "qwen3moe", **{f"qwen3moe.{k}": v for k, v in values.items()}}


def _rope_scaling_metadata(scaling: RopeScaling | None) -> dict[str, object]:
    if scaling is None:
        return {}
    return {
        "rope.scaling.type": scaling.type,
        "rope.scaling.factor": scaling.factor,
        "rope.scaling.original_context_length": scaling.original_max_position_embeddings,
    }


def tokenizer_metadata(vocab_size: int = TINY.vocab_size) -> dict[str, object]:
    """A sound byte-level vocabulary: the 256 bytes, merges, control tokens, padding."""
    merges = ["h e", "l l", "he ll"]
    tokens = [*BYTE_ALPHABET, *(m.replace(" ", "") for m in merges), "<|endoftext|>", "<|im_end|>"]
    tokens += [f"[PAD{i}]" for i in range(vocab_size - len(tokens))]
    first_control = len(BYTE_ALPHABET) + len(merges)
    types = [1] * first_control + [3, 3] + [5] * (vocab_size - first_control - 2)
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "qwen2",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": Typed(I32, types),
        "tokenizer.ggml.merges": merges,
        "tokenizer.ggml.eos_token_id": first_control + 1,
        "tokenizer.ggml.padding_token_id": first_control,
        "tokenizer.ggml.add_bos_token": False,
        "tokenizer.chat_template": "{{ messages[0].content }}",
    }


def model_tensors(config: Qwen3MoeConfig = TINY, types: dict[str, GGMLType] | None = None) -> list[Tensor]:
    """Every tensor of a model, all zeros: F32 unless ``types`` (by path) says otherwise."""
    return [_model_tensor(spec, (types or {}).get(spec.path, GGMLType.F32)) for spec in tensor_specs(config)]


def _model_tensor(spec: TensorSpec, type: GGMLType) -> Tensor:
    return Tensor(spec.gguf_name, spec.shape, type)


def model_builder(config: Qwen3MoeConfig = TINY, types: dict[str, GGMLType] | None = None) -> GGUFBuilder:
    """A whole sound model, ready to be broken."""
    metadata = model_metadata(config) | tokenizer_metadata(config.vocab_size)
    return GGUFBuilder(metadata, model_tensors(config, types))
