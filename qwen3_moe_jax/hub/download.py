"""One file into huggingface_hub's cache, in a way that goes on where an earlier try ended.

Since version 1.0 huggingface_hub deletes what it has when a download ends early. So the bytes are
written here, to a file beside the cache's blobs whose name has the file's hash: the same command goes on
after Ctrl-C, a kill or a lost network. When the file is whole and its SHA-256 is the hub's, it becomes a
blob, and the library links it. Requests, tokens, redirects and retries are the library's.
"""

import hashlib
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any
from urllib.parse import urlsplit

from qwen3_moe_jax.core.errors import HubError
from qwen3_moe_jax.hub.listing import RemoteFile, repo_folder

LARGEST_HTTP = 50 * 10**9
"""Larger files are not served whole: the library gets them in pieces."""

SHA256 = re.compile(r"[0-9a-f]{64}")
PIECE = 1 << 22


class _Counted:
    """A file whose writes are counted and hashed.

    Args:
      file: open for reading and writing.
      tell: called with the bytes that it holds.
    """

    def __init__(self, file: IO[bytes], tell: Callable[[int], None]):
        self._file, self._tell = file, tell
        self._hash, self.nbytes = hashlib.sha256(), 0

    def read_over(self) -> int:
        """Takes in what an earlier try left; returns its size."""
        self._file.seek(0)
        while piece := self._file.read(PIECE):
            self._hash.update(piece)
            self.nbytes += len(piece)
        return self.nbytes

    def write(self, data: bytes) -> int:
        self._file.write(data)
        self._hash.update(data)
        self.nbytes += len(data)
        self._tell(self.nbytes)
        return len(data)

    def tell(self) -> int:
        return self._file.tell()

    def seek(self, position: int, whence: int = 0) -> int:
        return self._file.seek(position, whence)

    def truncate(self, size: int | None = None) -> int:
        """A server that sends the whole file again makes the library begin anew, at the start."""
        left = self._file.truncate(size)
        self._hash, self.nbytes = hashlib.sha256(), 0
        self.read_over()
        return left

    def sha256(self) -> str:
        return self._hash.hexdigest()


def partial_of(repo: str, etag: str) -> Path:
    """Where the bytes of a file that is not whole yet are kept."""
    return repo_folder(repo) / "blobs" / f"{etag}.part"


def kept_nbytes(repo: str) -> int:
    """Bytes of files of a repository that are not whole yet."""
    return sum(path.stat().st_size for path in (repo_folder(repo) / "blobs").glob("*.part"))


def download(repo: str, commit: str, file: RemoteFile, tell: Callable[[int], None]) -> Path:
    """Downloads what is missing of a file and links it into the cache.

    Args:
      repo: "OWNER/REPO".
      commit: a hash.
      file: of the repository.
      tell: called with the bytes of the file that are here.

    Raises:
      HubError: the bytes are not those that the hub announced.
      Exception: whatever the library raises: see ``faults``.
    """
    from huggingface_hub import constants, get_hf_file_metadata, hf_hub_download, hf_hub_url
    from huggingface_hub.utils import build_hf_headers

    where: Any = {"revision": commit, "endpoint": constants.ENDPOINT}
    if file.nbytes <= LARGEST_HTTP:
        url = hf_hub_url(repo, file.path, **where)
        headers = build_hf_headers()
        meta = get_hf_file_metadata(url, headers=headers, timeout=constants.HF_HUB_ETAG_TIMEOUT)
        if meta.etag and meta.size is not None:
            if urlsplit(url).netloc != urlsplit(meta.location).netloc:
                headers.pop("authorization", None)  # a token is for the hub alone, not for its storage
            _complete_blob(repo, meta.etag, meta.location, headers, meta.size, tell)
    path = Path(hf_hub_download(repo, file.path, cache_dir=constants.HF_HUB_CACHE, **where))
    tell(file.nbytes)
    return path


def _complete_blob(
    repo: str, etag: str, url: str, headers: dict[str, str], nbytes: int, tell: Callable[[int], None]
) -> None:
    from filelock import FileLock

    partial = partial_of(repo, etag)
    blob = partial.with_suffix("")
    partial.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{partial}.lock"):
        if not blob.exists():
            _fill(partial, url, headers, nbytes, etag, tell)
            os.replace(partial, blob)
    Path(f"{partial}.lock").unlink(missing_ok=True)


def _fill(
    partial: Path, url: str, headers: dict[str, str], nbytes: int, etag: str, tell: Callable[[int], None]
) -> None:
    from huggingface_hub.file_download import http_get

    partial.touch()
    with partial.open("r+b") as raw:
        if partial.stat().st_size > nbytes:
            raw.truncate(0)
        file = _Counted(raw, tell)
        tell(file.read_over())
        http_get(url, file, resume_size=file.nbytes, headers=headers, expected_size=nbytes)  # type: ignore[arg-type]
    if SHA256.fullmatch(etag) and file.sha256() != etag:
        partial.unlink()
        raise HubError(f"{partial.name}: the bytes are not those that the hub announced: download it again")
