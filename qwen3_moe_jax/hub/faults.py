"""What huggingface_hub, its HTTP client or the disk can raise, as one line that says what to do."""

import errno
from collections.abc import Generator
from contextlib import contextmanager
from urllib.parse import urlsplit

from qwen3_moe_jax.core.errors import HubError, OutputFileError

LIBRARIES = (
    "huggingface_hub",
    "httpx",
    "httpx2",
    "httpcore",
    "httpcore2",
    "hf_xet",
    "requests",
    "urllib3",
    "filelock",
)
"""Packages whose exceptions are faults of the network or of the hub."""


@contextmanager
def explained(repo: str) -> Generator[None, None, None]:
    """Turns what the block raises into HubError, or OutputFileError for a fault of the disk."""
    try:
        yield
    except (HubError, OutputFileError):
        raise
    except Exception as error:
        if not isinstance(error, OSError) and type(error).__module__.split(".")[0] not in LIBRARIES:
            raise  # a bug of ours
        raise fault(repo, error) from error


def fault(repo: str, error: Exception) -> HubError | OutputFileError:
    """The error that a user is shown."""
    return _of_the_hub(repo, error) or _of_the_disk(error) or _of_the_network(error)


def _endpoint() -> str:
    from huggingface_hub import constants

    return constants.ENDPOINT


def _host() -> str:
    endpoint = _endpoint()
    return urlsplit(endpoint).netloc or endpoint


def _of_the_hub(repo: str, error: Exception) -> HubError | None:
    from huggingface_hub import errors

    page = f"{_endpoint()}/{repo}"
    if isinstance(error, errors.GatedRepoError):
        return HubError(
            f"{repo} is gated: accept its licence at {page}, then set HF_TOKEN or run `hf auth login`"
        )
    if isinstance(error, errors.RepositoryNotFoundError):
        return HubError(
            f"{_host()} has no repository {repo}: look at its spelling; a private one needs HF_TOKEN"
        )
    if isinstance(error, errors.RevisionNotFoundError):
        return HubError(f"{repo} has no such revision: leave out @REVISION, or look at {page}/tree/main")
    if isinstance(error, errors.OfflineModeIsEnabled):
        return HubError(f"{repo} is not in the cache and HF_HUB_OFFLINE is set: unset it to download")
    if isinstance(error, errors.LocalEntryNotFoundError):
        return HubError(f"{_host()} cannot be reached and the file is not in the cache: look at the network")
    if isinstance(error, errors.EntryNotFoundError):
        return HubError(f"{repo} has lost a file that it listed: try again")
    if isinstance(error, errors.HFValidationError):
        return HubError(f"{repo} is no name of a repository: {_said(error)}")
    if isinstance(error, errors.HfHubHTTPError):
        return HubError(_of_status(repo, getattr(error.response, "status_code", 0), page))
    return None


def _of_status(repo: str, status: int, page: str) -> str:
    host = _host()
    if status == 401:
        return f"{host} refuses the token (401): set HF_TOKEN to a valid one, or unset it for a public model"
    if status == 403:
        return (
            f"{repo} is not open to this token (403): accept its licence at {page}, or set another HF_TOKEN"
        )
    if status == 404:
        return f"{host} has no {repo}, or not this file (404)"
    if status == 429:
        return f"{host} wants fewer requests (429): wait some minutes, or set HF_TOKEN"
    return f"{host} answers with status {status}: try again later; what was downloaded is kept"


_DISK = {
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "the disk's quota is used up",
    errno.EACCES: "it may not be written",
    errno.EPERM: "it may not be written",
    errno.EROFS: "the file system is read-only",
    errno.EIO: "the disk has a fault",
    errno.EFBIG: "the file is too large for the file system or a limit",
}


def _of_the_disk(error: Exception) -> OutputFileError | None:
    from huggingface_hub import constants

    text = _DISK.get(error.errno or 0) if isinstance(error, OSError) else None
    if text is None:
        return None
    return OutputFileError(
        f"the cache {constants.HF_HUB_CACHE}: {text}: HF_HUB_CACHE names another folder; "
        "what was downloaded is kept"
    )


def _of_the_network(error: Exception) -> HubError:
    host, said, kind = _host(), _said(error), type(error).__name__
    if "CERTIFICATE" in said.upper() or "SSL" in said.upper():
        return HubError(
            f"the certificate of {host} is not trusted: SSL_CERT_FILE names your network's bundle ({said})"
        )
    if "Timeout" in kind:
        return HubError(
            f"{host} does not answer in time: try again, or raise HF_HUB_ETAG_TIMEOUT "
            "and HF_HUB_DOWNLOAD_TIMEOUT"
        )
    if "Consistency check" in said:
        return HubError(f"{host} sent fewer bytes than it announced: the same command goes on from there")
    if "UnsupportedProtocol" in kind or "InvalidURL" in kind:
        return HubError(f"HF_ENDPOINT={_endpoint()} is no address such as https://huggingface.co")
    return HubError(
        f"{host} cannot be reached ({said}): look at the network, a proxy, or HF_ENDPOINT for a mirror"
    )


def _said(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
