"""A repository's GGUF files, asked of the hub or read from the cache: variants with their shards."""

import os
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from qwen3_moe_jax.convert.progress import format_bytes
from qwen3_moe_jax.core.errors import HubError, OptionError
from qwen3_moe_jax.core.near_names import near_names
from qwen3_moe_jax.hub.faults import explained
from qwen3_moe_jax.hub.names import HubName, quant_of, runs, shard_of, without_shard


@dataclass(frozen=True)
class RemoteFile:
    """One file: its path in the repository, and its bytes."""

    path: str
    nbytes: int


@dataclass(frozen=True)
class Variant:
    """A model in one quantization: all its shards.

    Attributes:
      quant: as its name says it, or None.
      files: in order; ``files[0]`` is what is opened.
    """

    quant: str | None
    files: tuple[RemoteFile, ...]

    @property
    def nbytes(self) -> int:
        return sum(file.nbytes for file in self.files)

    @property
    def label(self) -> str:
        """What a user calls it: its quantization, or its file."""
        return self.quant or self.files[0].path


@dataclass(frozen=True)
class Listing:
    """A repository at one commit.

    Attributes:
      repo: "OWNER/REPO".
      commit: its hash.
      variants: by size.
      license: as the repository names it; "" where it does not.
      is_cached: read from this machine's cache; only what is there is listed.
    """

    repo: str
    commit: str
    variants: tuple[Variant, ...]
    license: str = ""
    is_cached: bool = False

    def named(self, name: HubName) -> Variant | None:
        """The variant that a name asks for; None if it asks for none.

        Raises:
          OptionError: there is no such file or quantization; near ones are named.
        """
        if name.file:
            return self._by_file(name.file)
        if name.quant:
            return self._by_quant(name.quant)
        return None

    def _by_file(self, path: str) -> Variant:
        for variant in self.variants:
            if any(file.path == path for file in variant.files):
                return variant
        paths = [file.path for variant in self.variants for file in variant.files]
        raise OptionError(f"{self.repo} has no file {path}{_near(path, paths)}; {self.offer()}")

    def _by_quant(self, quant: str) -> Variant:
        found = [v for v in self.variants if v.quant == quant] or [
            v for v in self.variants if (v.quant or "").removeprefix("UD-") == quant
        ]
        if len(found) > 1:
            files = " or ".join(f"hf:{self.repo}/{v.files[0].path}" for v in found)
            raise OptionError(f"{self.repo} has {len(found)} models in {quant}: name one, {files}")
        if not found:
            known = [v.quant for v in self.variants if v.quant]
            raise OptionError(f"{self.repo} has no {quant}{_near(quant, known)}; {self.offer()}")
        return found[0]

    def offer(self) -> str:
        """What there is, and which of it runs."""
        fit = [f"{v.label} ({format_bytes(v.nbytes)})" for v in self.variants if runs(v.quant)]
        rest = [v.label for v in self.variants if not runs(v.quant)]
        text = f"it has {', '.join(fit)}" if fit else "it has nothing of a type that is known to run"
        return text + (f"; types that do not run here: {', '.join(rest)}" if rest else "")


def _near(word: str, known: Iterable[str]) -> str:
    near = near_names(word, known)
    return f"; did you mean {' or '.join(near)}?" if near else ""


def variants_of(files: Iterable[RemoteFile]) -> tuple[Variant, ...]:
    """Groups files into variants, smallest first; an incomplete set of shards is left out."""
    groups: dict[str, list[RemoteFile]] = defaultdict(list)
    for file in files:
        if file.path.endswith(".gguf") and not os.path.basename(file.path).startswith("mmproj"):
            groups[without_shard(file.path)].append(file)
    found = []
    for group in groups.values():
        group.sort(key=lambda file: file.path)
        numbers = [shard_of(file.path) for file in group]
        if [n for n, _ in numbers] == list(range(1, numbers[0][1] + 1)):
            found.append(Variant(quant_of(group[0].path), tuple(group)))
    return tuple(sorted(found, key=lambda v: (v.nbytes, v.files[0].path)))


def ask(name: HubName) -> Listing:
    """The listing, from the hub.

    Raises:
      HubError: the hub cannot be reached, or refuses; the repository has no GGUF file.
    """
    with explained(name.repo):
        from huggingface_hub import HfApi, constants

        info = HfApi(endpoint=constants.ENDPOINT).model_info(
            name.repo, revision=name.revision, files_metadata=True, timeout=constants.HF_HUB_ETAG_TIMEOUT
        )
    files = [RemoteFile(s.rfilename, s.size or 0) for s in info.siblings or []]
    variants = variants_of(files)
    if not variants:
        raise HubError(_no_file(name.repo, files))
    return Listing(name.repo, info.sha or name.revision, variants, _license(info))


def _no_file(repo: str, files: list[RemoteFile]) -> str:
    others = sorted({os.path.splitext(f.path)[1] for f in files} & {".safetensors", ".bin"})
    what = f" (it has {' and '.join(others)})" if others else ""
    return (
        f"{repo} has no GGUF file{what}: look for the same name with -GGUF at its end, such as hf:{repo}-GGUF"
    )


def _license(info: object) -> str:
    tags = getattr(info, "tags", None) or []
    return next((tag.removeprefix("license:") for tag in tags if tag.startswith("license:")), "")


def repo_folder(repo: str) -> Path:
    """Where the cache keeps a repository."""
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE) / f"models--{repo.replace('/', '--')}"


def cached(name: HubName) -> Listing | None:
    """The listing of what the cache has of a repository, at the commit that was seen last."""
    folder = repo_folder(name.repo)
    try:
        commit = (folder / "refs" / name.revision).read_text().strip()
    except OSError:
        commit = name.revision
    variants = files_in(folder / "snapshots" / commit)
    return Listing(name.repo, commit, variants, is_cached=True) if variants else None


def files_in(snapshot: Path, *, deep: bool = True) -> tuple[Variant, ...]:
    """The complete variants in a folder, and if ``deep`` in the folders in it."""
    return variants_of(
        RemoteFile(path.relative_to(snapshot).as_posix(), path.stat().st_size)
        for path in sorted(snapshot.rglob("*.gguf") if deep else snapshot.glob("*.gguf"))
        if path.is_file()
    )
