"""Text to token ids and back, from a GGUF file's metadata alone.

Byte-level BPE with the qwen2 pre-tokenizer, run by Hugging Face ``tokenizers``.
Three decisions:

- **Control tokens in text stay text.** ``<|im_end|>`` typed by a user is encoded
  as the characters it is. Only ``parse_special=True`` (text that the caller
  vouches for) and the template's own part of a rendered chat make control ids.
  User-defined tokens (``<think>``, ``<tool_call>``) are ordinary vocabulary and
  are matched everywhere, as llama.cpp and Hugging Face both do.
- **No Unicode normalization.** The file carries none, llama.cpp applies none, and
  so ``decode(encode(text)) == text``. Hugging Face's tokenizer.json normalizes to
  NFC first; ``unicodedata.normalize("NFC", text)`` gives its ids where they differ
  (decomposed accents only).
- **Built when first needed.** Decoding needs the token list alone; the BPE tables
  of the 151,936-token vocabulary (about 0.3 s) are built at the first ``encode``.
"""

import codecs
import re
from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from enum import IntEnum
from functools import cached_property
from typing import TYPE_CHECKING, Any

from qwen3_moe_jax.convert.errors import ModelFileError
from qwen3_moe_jax.convert.tokenizer_metadata import BYTE_ALPHABET, check_tokenizer
from qwen3_moe_jax.text.chat_template import RenderedChat

if TYPE_CHECKING:
    import tokenizers

QWEN2_PATTERN = (
    r"(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])"
    r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
"""Splits text into words before BPE (llama.cpp at 0c1e57098, src/llama-vocab.cpp:383)."""

END_OF_GENERATION = frozenset(
    {"<|im_end|>", "<|endoftext|>", "<|fim_pad|>", "<|repo_name|>", "<|file_sep|>", "<|eot_id|>", "</s>"}
)
"""Tokens that end an answer whatever the file's eos id is (the part of llama.cpp's set that fits Qwen)."""

VISIBLE_CONTROL = frozenset(
    {"<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>", "<|fim_pad|>", "<|repo_name|>", "<|file_sep|>"}
)
"""GGUF types these as control because of their spelling; Qwen's tokenizer declares them ordinary text."""


class TokenType(IntEnum):
    """``tokenizer.ggml.token_type`` (gguf-py's constants)."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


def _byte_symbols() -> dict[str, int]:
    """The byte of each of GPT-2's 256 stand-ins: itself, or for U+0100 and up the next byte left over."""
    plain = {ord(symbol) for symbol in BYTE_ALPHABET} & set(range(256))
    others = iter(sorted(set(range(256)) - plain))
    return {symbol: ord(symbol) if ord(symbol) < 256 else next(others) for symbol in BYTE_ALPHABET}


_BYTE_OF_SYMBOL = _byte_symbols()


class Tokenizer:
    """The tokenizer of one model file.

    Attributes:
      eos_id: the file's end-of-sequence id, or None.
      bos_id: the id that starts every text, or None where the file asks for none (Qwen).
      stop_ids: every id that ends an answer.
    """

    def __init__(self, metadata: Mapping[str, object], *, vocab_size: int | None = None):
        """Checks the metadata; builds nothing yet.

        Args:
          metadata: GGUF keys; only ``tokenizer.ggml.*`` are read.
          vocab_size: rows of the embedding, which may be more than the tokens (padding).

        Raises:
          ModelFileError: E_TOKENIZER, the metadata does not describe a usable tokenizer.
        """
        check_tokenizer(metadata, vocab_size)
        values: Mapping[str, Any] = metadata
        self._tokens: list[str] = values["tokenizer.ggml.tokens"]
        self._types: list[int] = values["tokenizer.ggml.token_type"]
        self._merges: list[str] = values["tokenizer.ggml.merges"]
        self._vocab_size = max(vocab_size or 0, len(self._tokens))
        added = (TokenType.CONTROL, TokenType.USER_DEFINED)
        self._added = {t: i for i, t in enumerate(self._tokens) if self._types[i] in added}
        self.eos_id: int | None = values.get("tokenizer.ggml.eos_token_id")
        wants_bos = values.get("tokenizer.ggml.add_bos_token", False)
        self.bos_id: int | None = values.get("tokenizer.ggml.bos_token_id") if wants_bos else None
        self.stop_ids = self._find_stop_ids(values)
        self.shown_bytes: Mapping[int, bytes] = _Remembered(self.token_bytes)

    @classmethod
    def built(cls, metadata: Mapping[str, object], *, vocab_size: int | None = None) -> "Tokenizer":
        """One that has built what the first text needs, a third of a second for 150,000 tokens.

        Raises:
          ModelFileError: as ``Tokenizer``; what the library refuses is told with the first text.
        """
        tokenizer = cls(metadata, vocab_size=vocab_size)
        with suppress(ModelFileError):
            _ = tokenizer._bpe
        return tokenizer

    def _find_stop_ids(self, metadata: Mapping[str, Any]) -> frozenset[int]:
        keys = [f"tokenizer.ggml.{kind}_token_id" for kind in ("eos", "eot", "eom")]
        declared = {metadata[key] for key in keys if key in metadata}
        for key in keys:
            declared |= set(metadata.get(f"{key}s", ()))
        return frozenset(declared | {self._added[t] for t in END_OF_GENERATION if t in self._added})

    def __repr__(self) -> str:
        return f"<Tokenizer: {self._vocab_size} ids, stops at {sorted(self.stop_ids)}>"

    @property
    def vocab_size(self) -> int:
        """Ids are 0 to vocab_size - 1, padding rows of the embedding included."""
        return self._vocab_size

    def encode(self, text: str, *, parse_special: bool = False) -> list[int]:
        """Token ids of a text.

        Args:
          text: any text; control tokens in it stay text.
          parse_special: make control ids of control tokens: for text that no user wrote.

        Raises:
          ValueError: the text has half of a surrogate pair and so no UTF-8 form.
        """
        return self._encode(text, lambda match: parse_special)

    def encode_chat(self, chat: RenderedChat) -> list[int]:
        """Token ids of a rendered chat: the template's control tokens count, those in messages stay text."""

        def from_template(match: re.Match[str]) -> bool:
            following = bisect_left(chat.inert, match.start())
            touched = following < len(chat.inert) and chat.inert[following] < match.end()
            return ("|" in match.group() or match.group() in chat.tracked) and not touched

        return self._encode(chat.text, from_template)

    @property
    def control_tokens(self) -> list[str]:
        """Texts of the control tokens, by the vocabulary's own types."""
        return [token for token, i in self._added.items() if self._types[i] == TokenType.CONTROL]

    def _encode(self, text: str, accept_control: Callable[[re.Match[str]], bool]) -> list[int]:
        _check_encodable(text)
        ids: list[int] = []
        start = 0
        for match in self._added_tokens(text, accept_control):
            ids += self._encode_plain(text[start : match.start()])
            ids.append(self._added[match.group()])
            start = match.end()
        ids += self._encode_plain(text[start:])
        if self.bos_id is not None and ids[:1] != [self.bos_id]:
            ids.insert(0, self.bos_id)
        return ids

    def _added_tokens(
        self, text: str, accept_control: Callable[[re.Match[str]], bool]
    ) -> Iterator[re.Match[str]]:
        for match in self._added_pattern.finditer(text) if self._added else ():
            is_control = self._types[self._added[match.group()]] == TokenType.CONTROL
            if not is_control or accept_control(match):
                yield match

    def _encode_plain(self, text: str) -> list[int]:
        return self._bpe.encode(text, add_special_tokens=False).ids if text else []

    @cached_property
    def _added_pattern(self) -> re.Pattern[str]:
        longest_first = sorted(self._added, key=len, reverse=True)
        return re.compile("|".join(map(re.escape, longest_first)))

    @cached_property
    def _bpe(self) -> "tokenizers.Tokenizer":
        from tokenizers import Regex, Tokenizer, models, pre_tokenizers

        # Normal tokens alone: no list of merges can spell its way to a control id.
        vocab = {t: i for i, t in enumerate(self._tokens) if self._types[i] == TokenType.NORMAL}
        merges = [(left, right) for left, _, right in (merge.partition(" ") for merge in self._merges)]
        try:
            tokenizer = Tokenizer(models.BPE(vocab, merges))
        except Exception as error:  # the library raises bare Exception
            raise ModelFileError("E_TOKENIZER", str(error), name="tokenizer.ggml.merges") from error
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(QWEN2_PATTERN), "isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
        return tokenizer

    def token_bytes(self, token_id: int, *, show_control: bool = False) -> bytes:
        """The UTF-8 bytes that a token stands for, perhaps a part of a character.

        Empty for padding and, unless ``show_control``, for control tokens.

        Raises:
          ValueError: the id is outside the vocabulary.
        """
        if not 0 <= token_id < self._vocab_size:
            raise ValueError(f"token id {token_id} is outside the vocabulary of {self._vocab_size}")
        if token_id >= len(self._tokens):
            return b""
        token, kind = self._tokens[token_id], self._types[token_id]
        if kind == TokenType.NORMAL and _BYTE_OF_SYMBOL.keys() >= set(token):
            return bytes(_BYTE_OF_SYMBOL[symbol] for symbol in token)
        visible = kind in (TokenType.NORMAL, TokenType.USER_DEFINED) or token in VISIBLE_CONTROL
        if visible or (show_control and kind == TokenType.CONTROL):
            return token.encode()
        return b""

    def decode(self, token_ids: Iterable[int], *, show_control: bool = False) -> str:
        """The text of token ids; bytes that are no UTF-8 become U+FFFD.

        Raises:
          ValueError: an id is outside the vocabulary.
        """
        pieces = (self.token_bytes(token_id, show_control=show_control) for token_id in token_ids)
        return b"".join(pieces).decode("utf-8", errors="replace")


class _Remembered(dict[int, bytes]):
    """What a function gives for a token id, found once: decoding asks for it at each token of each answer."""

    def __init__(self, find: Callable[[int], bytes]):
        self._find = find

    def __missing__(self, token_id: int) -> bytes:
        found = self[token_id] = self._find(token_id)
        return found


def control_tokens(metadata: Mapping[str, Any]) -> list[str]:
    """``Tokenizer.control_tokens`` of a file whose vocabulary is not checked yet."""
    tokens, types = (metadata.get(f"tokenizer.ggml.{key}") for key in ("tokens", "token_type"))
    if not isinstance(tokens, list) or not isinstance(types, list):
        return []
    pairs = zip(tokens, types, strict=False)
    return [token for token, kind in pairs if kind == TokenType.CONTROL and isinstance(token, str)]


class StreamDecoder:
    """Decodes token by token: what it returns, joined, is ``Tokenizer.decode`` of the same ids.

    A character that spans tokens comes out once it is whole. U+FFFD comes out only
    once no later byte can complete the sequence.
    """

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, token_id: int) -> str:
        """The text that this token completes, perhaps none."""
        return self._utf8.decode(self._tokenizer.shown_bytes[token_id])

    def finish(self) -> str:
        """What an unfinished character at the end becomes."""
        return self._utf8.decode(b"", final=True)


def _check_encodable(text: str) -> None:
    if not isinstance(text, str):
        raise ValueError(f"text must be a str, not {type(text).__name__}")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"the text has half of a surrogate pair at character {error.start} and so no UTF-8 form"
        ) from error
