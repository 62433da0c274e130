"""The manifest of a packed checkpoint: every file, its size, and SHA-256 of its pieces.

Orbax stores array data without a checksum, so a flipped bit would load
silently. The manifest covers every file of a checkpoint, and ``manifest.sha256``
covers the manifest. Files are hashed in pieces of 16 MiB, so that one large
array is verified on several cores, and each piece while it is in cache.

Nothing in a manifest is trusted: names are matched against what a model of
this config must have, never used as they are.
"""

# Elements of untrusted lists and of NumPy functions have types that no declaration gives.
# pyright: reportUnknownVariableType=false, reportUnknownArgumentType=false, reportUnknownMemberType=false

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from qwen3_moe_jax.convert.errors import ModelFileError
from qwen3_moe_jax.convert.packed import LAYOUT_VERSION, ROWS

FORMAT = "qwen3-moe-jax packed checkpoint"
FORMAT_VERSION = 1
PIECE_BYTES = 16 << 20
MANIFEST_NAME = "manifest.json"
CHECKSUM_NAME = "manifest.sha256"
METADATA_NAME = "metadata.json"
TENSORS_NAME = "tensors"

MAX_MANIFEST_BYTES = 64 << 20
MAX_METADATA_BYTES = 512 << 20

_HEX_DIGEST = re.compile(r"[0-9a-f]{64}")
_FIELDS = (
    "format",
    "version",
    "layout",
    "layout_version",
    "piece_nbytes",
    "source",
    "config",
    "types",
    "files",
)


@dataclass(frozen=True)
class FileRecord:
    """Size and piece digests (SHA-256, hexadecimal) of one file."""

    nbytes: int
    sha256: tuple[str, ...]


@dataclass(frozen=True)
class Manifest:
    """What a checkpoint holds.

    Attributes:
      source: what it was made from, for people: name, identity, size.
      config: the fields of the model's config.
      types: name of the quantization type of each tensor, by parameter path.
      files: record of each file, by its path inside the checkpoint.
    """

    source: Mapping[str, Any]
    config: Mapping[str, Any]
    types: Mapping[str, str]
    files: Mapping[str, FileRecord]

    def to_json(self) -> bytes:
        """The bytes of ``manifest.json``."""
        head = {
            "format": FORMAT,
            "version": FORMAT_VERSION,
            "layout": ROWS,
            "layout_version": LAYOUT_VERSION,
            "piece_nbytes": PIECE_BYTES,
        }
        return json.dumps({**head, **asdict(self)}, indent=1).encode()

    @classmethod
    def from_json(cls, data: bytes) -> "Manifest":
        """Parses and checks the form of a manifest; what it means is the reader's to check.

        Raises:
          ModelFileError: ``E_CHECKPOINT``.
        """
        fields = parse_object(data, MANIFEST_NAME)
        _check_versions(fields)
        if set(fields) != set(_FIELDS):
            raise damaged(MANIFEST_NAME, "has missing or unknown fields")
        for name in ("source", "config", "types", "files"):
            if not isinstance(fields[name], dict):
                raise damaged(MANIFEST_NAME, f"has a field {name} that is no table")
        files = {name: _file_record(record) for name, record in fields["files"].items()}
        return cls(fields["source"], fields["config"], fields["types"], files)


def _check_versions(fields: Mapping[str, Any]) -> None:
    if fields.get("format") != FORMAT:
        raise damaged(MANIFEST_NAME, "is not that of a packed checkpoint")
    wanted = {
        "version": FORMAT_VERSION,
        "layout": ROWS,
        "layout_version": LAYOUT_VERSION,
        "piece_nbytes": PIECE_BYTES,
    }
    for name, value in wanted.items():
        if fields.get(name) != value or isinstance(fields[name], bool):
            found = fields.get(name)
            shown = found if isinstance(found, int) and abs(found) < 10**6 else "something else"
            raise ModelFileError(
                "E_CHECKPOINT",
                f"the checkpoint has {name} {shown}, this program reads {value}; convert the .gguf again",
                name=MANIFEST_NAME,
            )


def _file_record(record: Any) -> FileRecord:
    if not isinstance(record, dict) or set(record) != {"nbytes", "sha256"}:
        raise damaged(MANIFEST_NAME, "has a file record of another form")
    fields: dict[str, Any] = record
    nbytes, digests = fields["nbytes"], fields["sha256"]
    if isinstance(nbytes, bool) or not isinstance(nbytes, int) or not 0 <= nbytes < 2**63:
        raise damaged(MANIFEST_NAME, "has a file size that is no size")
    if not isinstance(digests, list) or len(digests) != -(-nbytes // PIECE_BYTES):
        raise damaged(MANIFEST_NAME, "has a wrong number of digests for a file")
    if not all(isinstance(digest, str) and _HEX_DIGEST.fullmatch(digest) for digest in digests):
        raise damaged(MANIFEST_NAME, "has a digest that is no SHA-256")
    return FileRecord(nbytes, tuple(digests))


def pieces(nbytes: int) -> list[slice]:
    """The pieces that a file of ``nbytes`` is hashed in."""
    return [slice(start, min(start + PIECE_BYTES, nbytes)) for start in range(0, nbytes, PIECE_BYTES)]


def piece_digest(piece: Any) -> str:
    """SHA-256 of one piece (any contiguous buffer), as hexadecimal digits."""
    return hashlib.sha256(piece).hexdigest()


def checksum_file(manifest: bytes) -> bytes:
    """The bytes of ``manifest.sha256``, in the form that ``sha256sum --check`` reads."""
    return f"{hashlib.sha256(manifest).hexdigest()}  {MANIFEST_NAME}\n".encode()


def parse_object(data: bytes, name: str) -> dict[str, Any]:
    """Parses one JSON object of an untrusted file.

    Raises:
      ModelFileError: ``E_CHECKPOINT`` for anything else.
    """
    try:
        value = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise damaged(name, "is not valid JSON") from error
    if not isinstance(value, dict):
        raise damaged(name, "is not a JSON object")
    return value


def damaged(name: str, problem: str) -> ModelFileError:
    """The error for a checkpoint whose file ``name`` cannot be used."""
    return ModelFileError(
        "E_CHECKPOINT", f"{name} {problem}; the checkpoint is damaged: convert the .gguf again", name=name
    )
