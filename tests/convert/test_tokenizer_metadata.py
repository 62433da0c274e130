"""A vocabulary whose parts do not fit is refused before a tokenizer is built of it."""

from pathlib import Path

import pytest

from qwen3_moe_jax.convert.errors import ModelFileError
from qwen3_moe_jax.convert.gguf_file import GGUFFile
from qwen3_moe_jax.convert.tokenizer_metadata import BYTE_ALPHABET, check_tokenizer
from qwen3_moe_jax.testing.gguf_builder import Typed, tokenizer_metadata

DATA = Path(__file__).resolve().parents[1] / "data"
VOCAB = 270
MISSING = object()


def metadata(**changes: object) -> dict[str, object]:
    """A sound vocabulary as a file would give it, with ``tokenizer.ggml.<name>`` replaced."""
    values = {k: v.value if isinstance(v, Typed) else v for k, v in tokenizer_metadata(VOCAB).items()}
    values |= {f"tokenizer.ggml.{name}": value for name, value in changes.items()}
    return {key: value for key, value in values.items() if value is not MISSING}


def tokens(index: int, value: object) -> list:
    changed = list(metadata()["tokenizer.ggml.tokens"])
    changed[index] = value
    return changed


def types(index: int, value: object) -> list:
    changed = list(metadata()["tokenizer.ggml.token_type"])
    changed[index] = value
    return changed


BAD = {
    "no model": ("model", MISSING),
    "another model": ("model", "llama"),
    "model of another type": ("model", 2),
    "no pre-tokenizer": ("pre", MISSING),
    "another pre-tokenizer": ("pre", "llama-bpe"),
    "no tokens": ("tokens", MISSING),
    "tokens empty": ("tokens", []),
    "tokens not an array": ("tokens", "abc"),
    "tokens of another type": ("tokens", list(range(VOCAB))),
    "one token of another type": ("tokens", tokens(3, 7)),
    "duplicate token": ("tokens", tokens(5, BYTE_ALPHABET[4])),
    "empty token": ("tokens", tokens(VOCAB - 1, "")),
    "a byte is missing": ("tokens", tokens(0, "[PAD999]")),
    "no token types": ("token_type", MISSING),
    "too few token types": ("token_type", [1] * (VOCAB - 1)),
    "too many token types": ("token_type", [1] * (VOCAB + 1)),
    "token types are floats": ("token_type", [1.0] * VOCAB),
    "token types are booleans": ("token_type", [True] * VOCAB),
    "token type 0": ("token_type", types(9, 0)),
    "token type 7": ("token_type", types(9, 7)),
    "token type negative": ("token_type", types(9, -1)),
    "too few scores": ("scores", [0.0]),
    "scores are integers": ("scores", [0] * VOCAB),
    "no merges": ("merges", MISSING),
    "merges of another type": ("merges", [1, 2]),
    "merge without a space": ("merges", ["he"]),
    "merge with two spaces": ("merges", ["h e l"]),
    "merge of nothing": ("merges", [" e"]),
    "merge with nothing": ("merges", ["h "]),
    "empty merge": ("merges", [""]),
    "merge of an unknown token": ("merges", ["hex e"]),
    "merge that makes no token": ("merges", ["x y"]),
    "duplicate merge": ("merges", ["h e", "h e"]),
    "eos beyond the vocabulary": ("eos_token_id", VOCAB),
    "eos negative": ("eos_token_id", -1),
    "eos is a text": ("eos_token_id", "<|im_end|>"),
    "eos is true": ("eos_token_id", True),
    "padding beyond the vocabulary": ("padding_token_id", 2**32 - 1),
    "bos beyond the vocabulary": ("bos_token_id", VOCAB + 1),
    "fim token beyond the vocabulary": ("fim_pre_token_id", VOCAB),
    "one of many eos ids is bad": ("eos_token_ids", [1, VOCAB]),
    "eos ids are texts": ("eos_token_ids", ["a"]),
    "add_bos_token is a number": ("add_bos_token", 1),
    "add_eos_token is a text": ("add_eos_token", "false"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_vocabulary(case: str):
    key, value = BAD[case]
    with pytest.raises(ModelFileError) as caught:
        check_tokenizer(metadata(**{key: value}))
    assert caught.value.code == "E_TOKENIZER"
    assert caught.value.name == f"tokenizer.ggml.{key}"
    assert str(caught.value).isprintable()


@pytest.mark.parametrize("template", [7, ["a"], "x" * (2**20 + 1)])
@pytest.mark.parametrize("key", ["tokenizer.chat_template", "tokenizer.chat_template.tool_use"])
def test_bad_template(key: str, template: object):
    with pytest.raises(ModelFileError, match="E_TOKENIZER"):
        check_tokenizer(metadata() | {key: template})


def test_more_tokens_than_the_embedding_has_rows():
    check_tokenizer(metadata(), VOCAB)
    check_tokenizer(metadata(), VOCAB + 2)
    with pytest.raises(ModelFileError, match="only 269 rows"):
        check_tokenizer(metadata(), VOCAB - 1)


def test_optional_parts():
    check_tokenizer(
        metadata(
            scores=[0.0] * VOCAB, eos_token_ids=[1, 2], add_eos_token=False, merges=[], bos_token_id=MISSING
        )
    )


def test_hostile_text_is_escaped_in_the_message():
    with pytest.raises(ModelFileError) as caught:
        check_tokenizer(metadata(merges=["\x1b[2J\nfine"]))
    assert str(caught.value).isprintable()


def test_the_real_vocabulary():
    with GGUFFile.open(DATA / "ggml-vocab-qwen2.gguf") as file:
        assert len(file.metadata["tokenizer.ggml.tokens"]) == 151_936
        check_tokenizer(file.metadata, 151_936)
