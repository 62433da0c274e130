"""The vocabulary in a GGUF file's metadata, checked as a whole before a tokenizer is built of it.

Lengths, element types and ids are validated together, because a tokenizer
built of parts that do not fit gives wrong text or fails far from the cause.
Only byte-level BPE with the ``qwen2`` pre-tokenizer is accepted: every
Qwen3-MoE file has it, and another one would split text differently.
"""

# Elements of untrusted lists and of NumPy functions have types that no declaration gives.
# pyright: reportUnknownVariableType=false, reportUnknownArgumentType=false, reportUnknownMemberType=false

from collections.abc import Mapping
from typing import Any

from qwen3_moe_jax.convert.errors import ModelFileError, quote

_PREFIX = "tokenizer.ggml."
_TOKEN_TYPES = range(1, 7)  # normal, unknown, control, user-defined, unused, byte
_MAX_TEMPLATE = 2**20
_FLAGS = ("add_bos_token", "add_eos_token", "add_space_prefix")
_SUPPORTED = {"model": "gpt2", "pre": "qwen2"}

# GPT-2's byte alphabet: printable Latin-1 stands for itself, the other bytes for U+0100 and up.
_PRINTABLE_BYTES = (*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100))
BYTE_ALPHABET: tuple[str, ...] = (
    *(chr(b) for b in _PRINTABLE_BYTES),
    *(chr(0x100 + i) for i in range(256 - len(_PRINTABLE_BYTES))),
)


def check_tokenizer(metadata: Mapping[str, object], vocab_size: int | None = None) -> None:
    """Refuse a vocabulary that no sound byte-level BPE tokenizer can be built of.

    Args:
      metadata: keys and values of the file.
      vocab_size: rows of the embedding; there may not be more tokens, and fewer are padding.

    Raises:
      ModelFileError: ``E_TOKENIZER``, its name the metadata key at fault.
    """
    for key, wanted in _SUPPORTED.items():
        _check_supported(metadata, _PREFIX + key, wanted)
    tokens = _check_tokens(metadata, vocab_size)
    _check_per_token(metadata, "token_type", int, len(tokens), required=True)
    _check_token_types(metadata)
    _check_per_token(metadata, "scores", float, len(tokens), required=False)
    _check_merges(metadata, set(tokens))
    _check_ids_and_flags(metadata, len(tokens))
    _check_templates(metadata)


def _fail(key: str, problem: str) -> ModelFileError:
    return ModelFileError("E_TOKENIZER", f"{quote(key)} {problem}", name=key)


def _check_supported(metadata: Mapping[str, object], key: str, wanted: str) -> None:
    found = metadata.get(key)
    if found == wanted:
        return
    what = "is missing" if found is None else f"is {quote(str(found))}"
    raise _fail(key, f"{what}; supported: '{wanted}'")


def _array(metadata: Mapping[str, object], key: str, element: type) -> list[Any]:
    values: Any = metadata.get(key)
    if values is None:
        raise _fail(key, "is missing from the file")
    if not isinstance(values, list):
        raise _fail(key, "must be an array")
    # ``type``, not ``isinstance``: a boolean is no token type.
    if set(map(type, values)) - {element}:
        wrong = next(i for i, v in enumerate(values) if type(v) is not element)
        raise _fail(key, f"must hold {element.__name__} values; number {wrong} is another type")
    return values


def _check_tokens(metadata: Mapping[str, object], vocab_size: int | None) -> list[str]:
    key = _PREFIX + "tokens"
    tokens = _array(metadata, key, str)
    if not tokens:
        raise _fail(key, "is empty")
    if vocab_size is not None and len(tokens) > vocab_size:
        raise _fail(key, f"holds {len(tokens)} tokens, but the embedding has only {vocab_size} rows")
    different = set(tokens)
    if "" in different or len(different) != len(tokens):
        _refuse_tokens(key, tokens)
    missing = [c for c in BYTE_ALPHABET if c not in different]
    if missing:
        raise _fail(key, f"lacks {len(missing)} of the 256 byte tokens, the first is {quote(missing[0])}")
    return tokens


def _refuse_tokens(key: str, tokens: list[str]) -> None:
    """Raises for the first token that is empty or was there before."""
    known: dict[str, int] = {}
    for i, token in enumerate(tokens):
        if not token:
            raise _fail(key, f"has an empty token, number {i}")
        if known.setdefault(token, i) != i:
            raise _fail(key, f"has {quote(token)} twice, as number {known[token]} and {i}")


def _check_per_token(
    metadata: Mapping[str, object], name: str, element: type, count: int, *, required: bool
) -> None:
    key = _PREFIX + name
    if not required and key not in metadata:
        return
    values = _array(metadata, key, element)
    if len(values) != count:
        raise _fail(key, f"holds {len(values)} values for {count} tokens")


def _check_token_types(metadata: Mapping[str, object]) -> None:
    key = _PREFIX + "token_type"
    kinds: Any = metadata[key]
    if set(kinds) - set(_TOKEN_TYPES):
        i, kind = next((i, kind) for i, kind in enumerate(kinds) if kind not in _TOKEN_TYPES)
        raise _fail(key, f"gives token {i} the type {kind}; types go from 1 to 6")


def _check_merges(metadata: Mapping[str, object], tokens: set[str]) -> None:
    key = _PREFIX + "merges"
    merges = _array(metadata, key, str)
    for i, merge in enumerate(merges):
        left, space, right = merge.partition(" ")
        if not (left and space and right) or " " in right:
            raise _fail(key, f"number {i}, {quote(merge)}, is not two tokens with one space between them")
        if left not in tokens or right not in tokens or left + right not in tokens:
            raise _fail(key, f"number {i}, {quote(merge)}, uses or makes a text that is not a token")
    if len(set(merges)) != len(merges):
        raise _fail(key, "has the same merge twice")


def _check_ids_and_flags(metadata: Mapping[str, object], count: int) -> None:
    for key, value in metadata.items():
        if key.startswith(_PREFIX) and key.endswith("_token_id"):
            _check_id(key, value, count)
        elif key.startswith(_PREFIX) and key.endswith("_token_ids"):
            for one in _array(metadata, key, int):
                _check_id(key, one, count)
    for flag in _FLAGS:
        if not isinstance(metadata.get(_PREFIX + flag, False), bool):
            raise _fail(_PREFIX + flag, "must be true or false")


def _check_id(key: str, value: object, count: int) -> None:
    if type(value) is not int:
        raise _fail(key, "must be one integer")
    if not 0 <= value < count:
        raise _fail(key, f"is {value}; token ids go from 0 to {count - 1}")


def _check_templates(metadata: Mapping[str, object]) -> None:
    for key, value in metadata.items():
        if key != "tokenizer.chat_template" and not key.startswith("tokenizer.chat_template."):
            continue
        if not isinstance(value, str):
            raise _fail(key, "must be a text")
        if len(value) > _MAX_TEMPLATE:
            raise _fail(key, f"has {len(value)} characters; at most {_MAX_TEMPLATE} are allowed")
