"""A model's header before its download: types, memory and faults, from the first megabytes of its files.

The header is read by ranges into files of the announced sizes that are empty otherwise (sparse: they take no
room). So the same code judges a file that is here and one that is not.
"""

import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from qwen3_moe_jax.convert.errors import ModelFileError
from qwen3_moe_jax.convert.gguf_header import read_header
from qwen3_moe_jax.convert.open_model import open_model
from qwen3_moe_jax.convert.regular_file import RegularFile
from qwen3_moe_jax.convert.tokenizer_metadata import check_tokenizer
from qwen3_moe_jax.core.errors import HubError, OutputFileError
from qwen3_moe_jax.hub.faults import explained
from qwen3_moe_jax.hub.listing import Listing, RemoteFile, Variant
from qwen3_moe_jax.machine.memory import MemoryPlan

PREFIX = "qwen3-moe-header-"

PIECE = 512 << 10
"""Bytes of one range. A header has about 6 MB, for the tokenizer is in it."""

CONTEXT, CACHE_ITEMSIZE = 4096, 4
"""For the memory that is told before a download: the usual context, float32 keys and values."""


class _PartlyHere(RegularFile):
    """A file of which only what was read is here; ``read_into`` gets the rest."""

    def __init__(self, path: Path, url: str, headers: dict[str, str]):
        super().__init__(path)
        self._url, self._headers, self._here = url, headers, 0

    def read_into(self, buffer: memoryview, offset: int) -> None:
        while self._here < offset + len(buffer):
            self._fetch()
        super().read_into(buffer, offset)

    def _fetch(self) -> None:
        from huggingface_hub import constants
        from huggingface_hub.utils import get_session, hf_raise_for_status

        end = min(self._here + PIECE, self.size)
        headers = {**self._headers, "Range": f"bytes={self._here}-{end - 1}"}
        timeout = constants.HF_HUB_DOWNLOAD_TIMEOUT
        with get_session().stream("GET", self._url, headers=headers, timeout=timeout) as response:
            hf_raise_for_status(response)
            if response.status_code != 206 and self._here:
                raise HubError("the hub sends no parts of files")
            self._take(response.iter_bytes(), end)

    def _take(self, parts: Iterator[bytes], end: int) -> None:
        """Keeps the bytes up to ``end``; a server that knows no ranges would send the whole file."""
        with self.path.open("r+b") as file:
            file.seek(self._here)
            while self._here < end:
                part = next(parts, b"")[: end - self._here]
                if not part:
                    raise HubError("the hub sent fewer bytes than it announced")
                file.write(part)
                self._here += len(part)


@contextmanager
def headers_of(listing: Listing, variant: Variant) -> Iterator[Path]:
    """The first of a variant's files, in a folder of them with nothing but their headers, for the block.

    Raises:
      HubError: the hub cannot be reached, refuses, or sends no parts of files.
      ModelFileError: what was read is no GGUF header.
    """
    with tempfile.TemporaryDirectory(prefix=PREFIX) as folder:
        for file in variant.files:
            with explained(listing.repo):
                _read(listing, file, Path(folder) / Path(file.path).name)
        yield Path(folder) / Path(variant.files[0].path).name


def _read(listing: Listing, file: RemoteFile, path: Path) -> None:
    from huggingface_hub import constants, get_hf_file_metadata, hf_hub_url
    from huggingface_hub.utils import build_hf_headers

    where = {"revision": listing.commit, "endpoint": constants.ENDPOINT}
    url, headers = hf_hub_url(listing.repo, file.path, **where), build_hf_headers()
    meta = get_hf_file_metadata(url, headers=headers, timeout=constants.HF_HUB_ETAG_TIMEOUT)
    if urlsplit(url).netloc != urlsplit(meta.location).netloc:
        headers.pop("authorization", None)  # a token is for the hub alone, not for its storage
    with path.open("wb") as sparse:
        sparse.truncate(file.nbytes)
    remote = _PartlyHere(path, meta.location, headers)
    try:
        read_header(remote, 0)
    finally:
        remote.close()


@dataclass(frozen=True)
class Seen:
    """What a header says.

    Attributes:
      types: of the tensors, by name.
      plan: the memory it takes at 4,096 tokens, or its own context if that is less; None if it cannot run.
      fault: why it cannot run; empty if it can.
    """

    types: tuple[str, ...] = ()
    plan: MemoryPlan | None = None
    fault: str = ""


def look(listing: Listing, variant: Variant) -> Seen | None:
    """Judges a variant by its header; None where that cannot be read now."""
    with suppress(HubError, OutputFileError):
        return _seen(listing, variant)
    return None


def _seen(listing: Listing, variant: Variant) -> Seen:
    try:
        with headers_of(listing, variant) as path, open_model(path) as source:
            check_tokenizer(source.metadata, source.config.vocab_size)
            types = tuple(sorted({t.name for t in source.types.values()}))
            context = min(CONTEXT, source.config.max_position_embeddings)
            return Seen(types, MemoryPlan.of(source, context, CACHE_ITEMSIZE))
    except ModelFileError as error:
        return Seen(fault=f"{error.code}: {without_folder(error.message)}")


def without_folder(message: str) -> str:
    """A message about a header, without the folder in which it was for a moment."""
    return re.sub(rf"{re.escape(tempfile.gettempdir())}/{PREFIX}[^/]*/", "", message)
