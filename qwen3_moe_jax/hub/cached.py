"""Models that are on this machine: in huggingface_hub's cache, and files and checkpoints in folders."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from qwen3_moe_jax.convert.manifest import MANIFEST_NAME
from qwen3_moe_jax.hub.listing import files_in
from qwen3_moe_jax.hub.names import quant_of


@dataclass(frozen=True)
class Found:
    """A model on this machine.

    Attributes:
      name: what ``-m`` takes.
      path: the file that is opened, or a checkpoint's folder.
      kind: its quantization, "checkpoint", or "" where its name does not tell.
      nbytes: on the disk.
    """

    name: str
    path: Path
    kind: str
    nbytes: int


def hub_cache() -> Path:
    """The folder of huggingface_hub's cache."""
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE)


def in_hub_cache() -> Iterator[Found]:
    """Complete GGUF models of the commit that each repository's ``main`` had when it was seen last."""
    for repo in sorted(hub_cache().glob("models--*--*")):
        owner_repo = repo.name.removeprefix("models--").replace("--", "/", 1)
        for ref in sorted((repo / "refs").glob("*")):
            revision = "" if ref.name == "main" else f"@{ref.name}"
            snapshot = repo / "snapshots" / ref.read_text().strip()
            variants = files_in(snapshot)
            quants = [v.quant for v in variants]
            for v in variants:
                is_plain = v.quant is not None and quants.count(v.quant) == 1
                tail = f":{v.quant}" if is_plain else f"/{v.files[0].path}"
                name = f"hf:{owner_repo}{revision}{tail}"
                yield Found(name, snapshot / v.files[0].path, v.quant or "", v.nbytes)


def unfinished() -> Iterator[tuple[str, int]]:
    """(repository, bytes kept) of downloads that did not end."""
    for repo in sorted(hub_cache().glob("models--*--*")):
        kept = sum(path.stat().st_size for path in repo.glob("blobs/*.part"))
        if kept:
            yield repo.name.removeprefix("models--").replace("--", "/", 1), kept


def in_folders(folders: Iterable[Path]) -> Iterator[Found]:
    """GGUF files and packed checkpoints in folders, not in what lies deeper."""
    for folder in folders:
        for v in files_in(folder, deep=False):
            path = folder / v.files[0].path
            yield Found(str(path), path, quant_of(path.name) or "", v.nbytes)
        for manifest in sorted({*folder.glob(MANIFEST_NAME), *folder.glob(f"*/{MANIFEST_NAME}")}):
            folder = manifest.parent
            nbytes = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
            yield Found(str(folder), folder, "checkpoint", nbytes)
