"""Names of models on a hub: ``hf:OWNER/REPO[@REVISION][:QUANT]``, of one file, or a page's address.

A quantization is read out of a file's name, as every publisher of GGUF files writes it there:
``Qwen3-30B-A3B-Q4_K_M.gguf``, ``UD-Q4_K_XL/NAME-UD-Q4_K_XL-00001-of-00002.gguf``.
"""

import os
import re
from dataclasses import dataclass
from urllib.parse import unquote, urlsplit

from qwen3_moe_jax.convert.ggml_types import GGMLType
from qwen3_moe_jax.core.errors import OptionError

PREFIX = "hf:"
HOSTS = ("huggingface.co", "www.huggingface.co", "hf.co")
"""Hosts of pages whose addresses are understood, beside the one in HF_ENDPOINT."""

FORM = "hf:OWNER/REPO, hf:OWNER/REPO:Q4_K_M or hf:OWNER/REPO/FILE.gguf"

_PART = r"[A-Za-z0-9][A-Za-z0-9._-]*"
_REPO = re.compile(
    rf"(?P<repo>{_PART}/{_PART})(?:@(?P<revision>[^:]+?))?(?:/(?P<file>[^:]+))?(?::(?P<quant>.+))?"
)
_BARE = re.compile(rf"{_PART}/{_PART}(:[\w.-]+)?")
_SHARD = re.compile(r"-(\d{5})-of-(\d{5})$")
_QUANT = re.compile(
    r"(?:^|[-._/])((?:UD-)?(?:I?Q\d_[A-Z0-9]+(?:_[A-Z]+)?|TQ\d_\d|MXFP4(?:_MOE)?|NVFP4|BF16|FP?16|FP?32))$",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class HubName:
    """What a name says.

    Attributes:
      repo: "OWNER/REPO".
      revision: branch, tag or commit.
      file: a path in the repository, or None.
      quant: in capitals, or None.
    """

    repo: str
    revision: str = "main"
    file: str | None = None
    quant: str | None = None

    def __str__(self) -> str:
        revision = "" if self.revision == "main" else f"@{self.revision}"
        file = f"/{self.file}" if self.file else ""
        return f"{PREFIX}{self.repo}{revision}{file}" + (f":{self.quant}" if self.quant else "")


def parse(text: str) -> HubName | None:
    """The name that a text is; None for a path.

    Raises:
      OptionError: it begins as a name or an address and is none.
    """
    if re.match(r"https?:/", text, re.IGNORECASE):
        return _of_address(text)
    if not text.startswith(PREFIX):
        return None
    match = _REPO.fullmatch(text.removeprefix(PREFIX).strip("/"))
    if match is None or ".." in text:
        raise OptionError(f"{text!r} is no name of a model: write {FORM}")
    quant = match["quant"]
    return HubName(match["repo"], match["revision"] or "main", match["file"], quant and quant.upper())


def _of_address(text: str) -> HubName:
    parts = urlsplit(text)
    own = urlsplit(os.environ.get("HF_ENDPOINT", "")).netloc
    if parts.netloc not in (*HOSTS, own):
        raise OptionError(f"{text!r} is no page of a model hub: download the file, or write {FORM}")
    words = [unquote(word) for word in parts.path.split("/") if word]
    if len(words) < 2 or ".." in words or words[0] in ("datasets", "spaces"):
        raise OptionError(f"{text!r} is no model's page: write {FORM}")
    repo, rest = "/".join(words[:2]), words[2:]
    if len(rest) < 2 or rest[0] not in ("resolve", "blob", "tree", "raw"):
        return HubName(repo)
    path = "/".join(rest[2:])
    if path.endswith(".gguf"):
        return HubName(repo, rest[1], path)
    return HubName(repo, rest[1], None, quant_of(f"{path}.gguf") if path else None)


def guess(text: str) -> str:
    """ "hf:OWNER/REPO" for a text that looks like a repository's name without its prefix; else ""."""
    is_name = _BARE.fullmatch(text) and not text.endswith(".gguf")
    return f"{PREFIX}{text}" if is_name and not os.path.exists(text.split("/")[0]) else ""


def without_shard(path: str) -> str:
    """A file's path without ``.gguf`` and without its number among the shards."""
    return _SHARD.sub("", path.removesuffix(".gguf"))


def shard_of(path: str) -> tuple[int, int]:
    """(number from 1, count) of a shard; (1, 1) of a file that is whole."""
    found = _SHARD.search(path.removesuffix(".gguf"))
    return (int(found[1]), int(found[2])) if found else (1, 1)


def quant_of(path: str) -> str | None:
    """The quantization in a file's name, in capitals."""
    found = _QUANT.search(without_shard(path))
    return found[1].upper().replace("FP16", "F16").replace("FP32", "F32") if found else None


def runs(quant: str | None) -> bool:
    """Whether a file of this name has, as a rule, only types that this project runs."""
    if quant is None:
        return False
    whole = quant.removeprefix("UD-")
    base = re.sub(r"_(S|M|L|XL|MOE)$", "", whole)
    if re.fullmatch(r"IQ[123]_(XXS|XS|S|M)", whole):  # mixtures: IQ3_XS, IQ3_M and IQ2_M are no types
        return True
    return base in GGMLType.__members__ or base == "Q8_K"  # UD-Q8_K_XL holds Q8_0 and 16-bit floats
