"""A GGUF file that plays scripts: a real model for the real engine, whose every word is known beforehand.

The residual stream is the last token's one-hot vector, for attention and experts add zero. The output
matrix is a table of transitions, so the next token depends on the last one alone. A script is a chain of
tokens that occur nowhere else; its text is cut at random bytes, in the middle of characters, tags and JSON,
which is what a streaming parser must survive. The chat template ends a prompt with the control token
``<|go:NAME|>``, which starts a script: a user message that contains ``[[NAME]]`` chooses it, else RULES do.

Scripts without an end of their own: ``coin`` ("#heads" with p = 0.7, "#tails" 0.2, "#edge" 0.1), ``forever``,
and ``nonfinite`` (infinite logits for this sequence alone). ``<|fim_middle|>`` is followed by FIM, and a
plain text that ends in a small letter goes on with the alphabet.
"""

import itertools
import math
import random
import zlib
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from qwen3_moe_jax.convert.config import Qwen3MoeConfig
from qwen3_moe_jax.convert.ggml_types import GGMLType
from qwen3_moe_jax.convert.tensor_names import TensorSpec, tensor_specs
from qwen3_moe_jax.testing.gguf_builder import I32, GGUFBuilder, Tensor, Typed, model_metadata
from qwen3_moe_jax.testing.scripts import RULES, Rule, scripts
from qwen3_moe_jax.text.tokenizer import _BYTE_OF_SYMBOL

HIDDEN = 2048
"""Width of the residual stream: one place for each token that starts a transition."""

CERTAIN = 40.0
"""Logit of a script's next token, all others are 0: its probability is 1 - 1e-14."""

SIDES = {"#heads": 0.7, "#tails": 0.2, "#edge": 0.1}
FIM = "    return a + b  # the middle\n"
CONTROLS = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|fim_prefix|>",
    "<|fim_middle|>",
    "<|fim_suffix|>",
    "<|fim_pad|>",
)
TAGS = ("<think>", "</think>", "<tool_call>", "</tool_call>")
SIZES = (2, 3, 4, 5, 7, 9, 12, 16, 24, 40, 64)

_SYMBOL = {byte: symbol for symbol, byte in _BYTE_OF_SYMBOL.items()}
_NORMAL, _CONTROL, _USER = 1, 3, 4

TEMPLATE = (Path(__file__).parent / "scripted_template.jinja").read_text
HINTS = {
    "hermes": 'Answer with <tool_call>\\n{"name": ..., "arguments": ...}\\n</tool_call>.',
    "coder": "Answer with <tool_call>\\n<function=example>\\n<parameter=p>\\nvalue\\n</parameter>\\n"
    "</function>\\n</tool_call>.",
}


@dataclass
class _Vocabulary:
    """Tokens, their types, the place of each in the residual stream, and what follows each."""

    tokens: list[str] = field(default_factory=list)
    types: list[int] = field(default_factory=list)
    number: dict[str, int] = field(default_factory=dict)
    moves: dict[int, dict[int, float]] = field(default_factory=dict)
    taken: set[bytes] = field(default_factory=set)

    def add(self, text: str, kind: int) -> int:
        self.number[text] = len(self.tokens)
        self.tokens.append(text)
        self.types.append(kind)
        return self.number[text]

    def spell(self, piece: bytes) -> int:
        self.taken.add(piece)
        return self.add("".join(_SYMBOL[b] for b in piece), _NORMAL)

    def chain(self, ids: list[int]) -> None:
        """Each of these is followed by the next one for certain."""
        self.moves |= {one: {other: CERTAIN} for one, other in itertools.pairwise(ids)}

    def say(self, start: int, text: str, end: int, rng: random.Random) -> None:
        self.chain([start, *map(self.spell, cut(text, self.taken, rng)), end])


def cut(text: str, taken: set[bytes], rng: random.Random) -> list[bytes]:
    """The text in pieces of 2 bytes and more that are not in ``taken``, cut at random bytes.

    Raises:
      ValueError: there is no such cut.
    """
    data = text.encode()

    def pieces_from(start: int, mine: frozenset[bytes]) -> list[bytes] | None:
        if start == len(data):
            return []
        for size in (*rng.sample(SIZES[:5], 5), *SIZES[5:], len(data) - start):
            piece, left = data[start : start + size], len(data) - start - size
            if left < 0 or left == 1 or len(piece) < 2 or piece in taken or piece in mine:
                continue
            rest = pieces_from(start + size, mine | {piece})
            if rest is not None:
                return [piece, *rest]
        return None

    pieces = pieces_from(0, frozenset())
    if pieces is None:
        raise ValueError(f"cannot cut {text!r}: another seed, or another text")
    return pieces


def _vocabulary(call_format: str, seed: int) -> _Vocabulary:
    rng, v = random.Random(seed), _Vocabulary()
    for byte in range(256):
        v.add(_SYMBOL[byte], _NORMAL)
    for control in CONTROLS:
        v.add(control, _CONTROL)
    for tag in TAGS:
        v.add(tag, _USER)
    v.add("ĠĠ", _NORMAL)
    v.taken |= {b"  ", *(tag.encode() for tag in TAGS)}
    end = v.number["<|im_end|>"]
    for name, script in scripts(call_format).items():
        v.say(v.add(f"<|go:{name}|>", _CONTROL), script.text, end, rng)
    v.say(v.number["<|fim_middle|>"], FIM, v.number["<|endoftext|>"], rng)
    _add_endless(v, end)
    return v


def _add_endless(v: _Vocabulary, end: int) -> None:
    sides = {side: v.spell(side.encode()) for side in SIDES}
    v.moves[v.add("<|go:coin|>", _CONTROL)] = {sides[s]: CERTAIN + math.log(p) for s, p in SIDES.items()}
    v.moves |= {side: {end: CERTAIN} for side in sides.values()}
    tick, tock = v.spell(b"tick "), v.spell(b"tock ")
    v.chain([v.add("<|go:forever|>", _CONTROL), tick, tock, tick])
    v.moves[v.add("<|go:nonfinite|>", _CONTROL)] = {tick: math.inf}
    v.chain([*range(ord("a"), ord("z") + 1), end])


def _condition(rule: Rule) -> str:
    parts = [f"last.role == '{rule.role}'"] if rule.role else []
    parts += [f"' {rule.tool} ' in names ~ ' '"] if rule.tool else []
    return " and ".join(parts + [f"'{word}' in u" for word in rule.words])


def _template(names: list[str], call_format: str) -> str:
    go = lambda name: f"{{{{- '<|go:{name}|>' -}}}}\n"
    named = "".join(f"{{%- elif '[[{n}]]' in u -%}}{go(n)}" for n in names)
    ruled = "".join(f"{{%- elif {_condition(r)} -%}}{go(r.script)}" for r in RULES)
    choice = f"{{%- if false -%}}{named}{ruled}{{%- else -%}}{go('hello')}{{%- endif -%}}"
    return TEMPLATE().replace("@HINT@", HINTS[call_format]).replace("@CHOICE@", choice)


def _output_matrix(v: _Vocabulary) -> np.ndarray:
    """float32 [V, HIDDEN]: RMSNorm makes a one-hot vector sqrt(HIDDEN) long."""
    output = np.zeros((len(v.tokens), HIDDEN), np.float32)
    for last, following in v.moves.items():
        for token, logit in following.items():
            output[token, last] = 3e38 if math.isinf(logit) else logit / math.sqrt(HIDDEN)
    return output


def _tensor(spec: TensorSpec, v: _Vocabulary) -> Tensor:
    if spec.path == "embedding" or spec.gguf_name == "token_embd.weight":
        rows = np.eye(len(v.tokens), HIDDEN, dtype=np.float16)
        return Tensor(spec.gguf_name, spec.shape, GGMLType.F16, rows.tobytes())
    if spec.gguf_name == "output.weight":
        return Tensor(spec.gguf_name, spec.shape, GGMLType.F32, _output_matrix(v).tobytes())
    if len(spec.shape) == 1:
        return Tensor(spec.gguf_name, spec.shape, GGMLType.F32, np.ones(spec.shape, np.float32).tobytes())
    if spec.gguf_name.endswith("ffn_gate_inp.weight"):
        return Tensor(spec.gguf_name, spec.shape, GGMLType.F32, _router(spec).tobytes())
    return Tensor(spec.gguf_name, spec.shape, GGMLType.F16)


def _router(spec: TensorSpec) -> np.ndarray:
    """float32 [E, HIDDEN]: each token has favourites among the experts, which add nothing."""
    if min(spec.shape) == 2:
        return np.zeros(spec.shape, np.float32)
    rng = np.random.default_rng(zlib.crc32(spec.gguf_name.encode()))
    return rng.normal(size=spec.shape).astype(np.float32)


def build_scripted_model(
    *, call_format: str = "hermes", seed: int = 0, context: int = 4096, layers: int = 1, experts: int = 2
) -> bytes:
    """A GGUF file that says ``scripts(call_format)``, about 12 MB.

    Args:
      call_format: "hermes" or "coder".
      seed: of the cuts between tokens.
      context: positions that the model is said to have.
      layers, experts: how many; an eighth of the experts is chosen, by chance from more than two.
    """
    v = _vocabulary(call_format, seed)
    if len(v.tokens) > HIDDEN:
        raise ValueError(f"{len(v.tokens)} tokens do not fit {HIDDEN} places: fewer scripts")
    config = Qwen3MoeConfig(
        vocab_size=len(v.tokens),
        hidden_size=HIDDEN,
        num_hidden_layers=layers,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=64,
        num_experts=experts,
        num_experts_per_tok=max(1, experts // 8),
        moe_intermediate_size=256,
        rms_norm_eps=1e-6,
        rope_theta=1e6,
        max_position_embeddings=context,
    )
    names = [t[5:-2] for t in v.tokens if t.startswith("<|go:")]
    metadata = model_metadata(config) | {
        "general.name": f"Scripted Qwen3-{'Coder' if call_format == 'coder' else 'MoE'} {seed}",
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "qwen2",
        "tokenizer.ggml.tokens": v.tokens,
        "tokenizer.ggml.token_type": Typed(I32, v.types),
        "tokenizer.ggml.merges": ["Ġ Ġ"],
        "tokenizer.ggml.eos_token_id": v.number["<|im_end|>"],
        "tokenizer.ggml.padding_token_id": v.number["<|endoftext|>"],
        "tokenizer.ggml.add_bos_token": False,
        "tokenizer.chat_template": _template(names, call_format),
    }
    return GGUFBuilder(metadata, [_tensor(spec, v) for spec in tensor_specs(config)]).build()
