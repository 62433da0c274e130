"""How the next token is chosen from logits, and what a model's makers recommend."""

import secrets
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from numbers import Integral, Real

from qwen3_moe_jax.convert.errors import quote
from qwen3_moe_jax.core.arguments import check_number

MIN_TEMPERATURE, MAX_TEMPERATURE = 1e-3, 100.0
"""Of a temperature that is not 0: outside, logits overflow float32 or are flat."""

SEEDS = 2**32
"""As many seeds there are."""


@dataclass(frozen=True)
class Sampling:
    """Sampling parameters, in the order in which they are applied.

    Attributes:
      repetition_penalty: > 0; divides positive and multiplies negative logits of
        tokens in the prompt or the output (CTRL, arXiv 1909.05858).
      presence_penalty: subtracted from the logits of tokens already in the output
        (never of those that are only in the prompt).
      temperature: 0 is greedy: the highest logit, lowest id among equals.
      top_k: keep the k highest; 0 keeps all.
      top_p: keep the smallest set whose probabilities sum to >= top_p; 1 keeps all.
      min_p: drop tokens below min_p times the highest probability.
      seed: of the random stream; the same seed gives the same tokens on one backend.

    Raises:
      ValueError: a parameter is out of its range.
    """

    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int = 0

    def __post_init__(self):
        for field in fields(self):
            check_number(field.name, getattr(self, field.name), Integral if field.type is int else Real)
        _check(self, "repetition_penalty", 0.01 <= self.repetition_penalty <= 100, "between 0.01 and 100")
        _check(self, "presence_penalty", -100 <= self.presence_penalty <= 100, "between -100 and 100")
        _check(
            self,
            "temperature",
            self.temperature == 0 or MIN_TEMPERATURE <= self.temperature <= MAX_TEMPERATURE,
            f"0 (greedy) or between {MIN_TEMPERATURE:g} and {MAX_TEMPERATURE:g}",
        )
        _check(self, "top_k", 0 <= self.top_k < 2**31, "0 (keep all) or a count of tokens below 2**31")
        _check(self, "top_p", 0 < self.top_p <= 1, "above 0 and at most 1 (keep all)")
        _check(self, "min_p", 0 <= self.min_p <= 1, "between 0 and 1")
        _check(self, "seed", 0 <= self.seed < SEEDS, f"between 0 and {SEEDS - 1}")


def random_seed() -> int:
    """A seed that nobody chose."""
    return secrets.randbelow(SEEDS)


def _check(sampling: Sampling, name: str, is_right: bool, wanted: str) -> None:
    if not is_right:
        raise ValueError(f"{name} must be {wanted}, not {getattr(sampling, name)!r}")


NON_THINKING = Sampling(temperature=0.7, top_p=0.8, top_k=20)
THINKING = Sampling(temperature=0.6, top_p=0.95, top_k=20)
CODER = replace(NON_THINKING, repetition_penalty=1.05)
"""What Qwen recommends for its Instruct, thinking and Coder models (Qwen3 documentation and model cards)."""

_KEYS = {
    "temp": "temperature",
    "top_k": "top_k",
    "top_p": "top_p",
    "min_p": "min_p",
    "penalty_repeat": "repetition_penalty",
}
"""Of ``general.sampling.*`` (gguf-py's constants): those that ``Sampling`` has."""


def recommended_sampling(
    metadata: Mapping[str, object], *, thinking: bool | None = None
) -> tuple[Sampling, str]:
    """The sampling that a model file, or else its family, recommends, and in words where it comes from.

    A recommendation stops nobody: a value of the file that cannot be used is named in the words, and the
    family's takes its place. A ``top_k`` below 0 means all tokens, as in llama.cpp.

    Args:
      metadata: GGUF keys: ``general.sampling.*``, ``general.name`` and its like, the chat template.
      thinking: whether the model is going to think; None takes what the model does by itself.
    """
    sampling, origin = _recommended_by_family(metadata, thinking)
    taken: list[str] = []
    refused: list[str] = []
    for key, name in _KEYS.items():
        if f"general.sampling.{key}" not in metadata:
            continue
        value = metadata[f"general.sampling.{key}"]
        try:
            sampling = replace(sampling, **{name: _usable(key, value)})
            taken.append(key)
        except ValueError:
            refused.append(f"the file's {key} {_shown(value)} is not usable")
    if taken:
        named = f"the file's general.sampling ({', '.join(taken)})"
        is_whole = {"temp", "top_k", "top_p"} <= set(taken)
        origin = named if is_whole else f"{named}, else {origin}"
    return sampling, "; ".join([origin, *refused])


def _usable(key: str, value: object) -> object:
    """The value as ``Sampling`` has it; what is no number is left for it to refuse."""
    if key == "top_k" and isinstance(value, int) and not isinstance(value, bool):
        return max(value, 0)
    return _shortest(value)


def _shown(value: object) -> str:
    if isinstance(value, str):
        return quote(value)
    return "(an array)" if isinstance(value, list | tuple) else f"{value!s:.40}"


def _recommended_by_family(metadata: Mapping[str, object], thinking: bool | None) -> tuple[Sampling, str]:
    keys = ("general.name", "general.basename", "general.finetune")
    name = " ".join(str(metadata.get(key, "")) for key in keys).lower()
    template = str(metadata.get("tokenizer.chat_template", ""))
    if thinking is None:
        thinking = _thinks_by_itself(name, template)
    if thinking:
        return THINKING, "recommended for Qwen3 thinking"
    if "coder" in name or "<function=" in template:
        return CODER, "recommended for Qwen3-Coder"
    return NON_THINKING, "recommended for Qwen3 without thinking"


def _thinks_by_itself(name: str, template: str) -> bool:
    """Thinking models say so in their name; hybrids have a switch in their template, which is on."""
    if any(word in name for word in ("coder", "instruct", "base")):
        return False
    return "thinking" in name or "enable_thinking" in template


def _shortest(value: object) -> object:
    """0.7 instead of 0.699999988, which is what float32 makes of it."""
    return float(f"{value:.6g}") if isinstance(value, float) else value
