"""From a name to a file on this machine: listing, choice, room on the disk, download."""

import logging
import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path

from qwen3_moe_jax.convert.progress import format_bytes
from qwen3_moe_jax.core import terminal
from qwen3_moe_jax.core.errors import HubError, MemoryPlanError, OutputFileError
from qwen3_moe_jax.hub import header
from qwen3_moe_jax.hub import listing as listings
from qwen3_moe_jax.hub.download import download, kept_nbytes
from qwen3_moe_jax.hub.faults import explained
from qwen3_moe_jax.hub.header import Seen
from qwen3_moe_jax.hub.listing import Listing, Variant, repo_folder
from qwen3_moe_jax.hub.names import HubName, runs
from qwen3_moe_jax.machine.estimate import machine_memory
from qwen3_moe_jax.machine.headroom import Headroom
from qwen3_moe_jax.machine.memory import MemoryPlan

PREFERRED = (
    *("Q4_K_M", "UD-Q4_K_XL", "Q4_K_S", "Q5_K_M", "Q5_K_S", "Q6_K", "Q8_0"),
    *("IQ4_NL", "IQ4_XS", "Q3_K_L", "UD-Q3_K_XL", "Q3_K_XL", "Q3_K_M", "IQ3_M", "Q3_K_S", "IQ3_S", "IQ3_XS"),
    *("UD-IQ3_XXS", "IQ3_XXS", "UD-Q2_K_XL", "Q2_K_L", "Q2_K", "UD-IQ2_M", "IQ2_M", "Q2_K_S", "IQ2_S"),
    *("IQ2_XS", "UD-IQ2_XXS", "IQ2_XXS", "UD-IQ1_M", "IQ1_M", "UD-IQ1_S", "IQ1_S"),
)
"""Tried in this order when no quantization is asked for: Q4_K_M is the usual balance of size and loss. Where
not even Q4_K_S fits, the largest of the smaller ones that fits."""

CACHE_SHARE = 0.05
"""The KV cache of 4,096 tokens as a share of the weights, before a file's header says more (30B: 4.3 %)."""

MIN_FREE_BYTES = 256 << 20
"""What a download leaves free on the disk."""


def pull(name: HubName, *, quiet: bool = False, refresh: bool = True) -> Path:
    """The first file of the model that a name means, downloaded if need be.

    Args:
      name: of a repository, a quantization in it, or a file.
      quiet: say nothing, show no progress.
      refresh: ask the hub even if the cache has what the name means.

    Raises:
      HubError: the hub cannot be reached, refuses, or has no such model.
      OptionError: the repository has no such file or quantization.
      MemoryPlanError: no quantization was named, and none fits this machine.
      OutputFileError: the disk has no room, or cannot be written.
    """
    here = listings.cached(name)
    found = here and _in_cache(here, name)
    if here and found and not refresh:
        return _path(here, found)
    try:
        listing = listings.ask(name)
    except HubError as error:
        if not here or not found:
            raise
        if not quiet:
            terminal.note(f"{name}: taken from the cache ({error})")
        return _path(here, found)
    look = cache(lambda variant: header.look(listing, variant))
    variant = listing.named(name) or _kept(listing, found) or choose(listing, machine_memory(), look)
    return fetch(listing, name.revision, variant, quiet=quiet, look=look)


def is_cached(name: HubName) -> bool:
    """Whether the cache has what a name means."""
    here = listings.cached(name)
    return here is not None and _in_cache(here, name) is not None


def _in_cache(here: Listing, name: HubName) -> Variant | None:
    try:
        return here.named(name) or _preferred(here)[0]
    except (ValueError, IndexError):
        return None


def _kept(listing: Listing, found: Variant | None) -> Variant | None:
    """What the cache has already is taken before anything else, if the repository still has it."""
    return next((v for v in listing.variants if found and v.files == found.files), None)


def _path(listing: Listing, variant: Variant) -> Path:
    return repo_folder(listing.repo) / "snapshots" / listing.commit / variant.files[0].path


def _preferred(listing: Listing) -> list[Variant]:
    """The variants that run here, the first to be tried first."""
    ranks = {quant: rank for rank, quant in enumerate(PREFERRED)}
    usable = [v for v in listing.variants if runs(v.quant)]
    return sorted(usable, key=lambda v: (ranks.get(v.quant or "", len(ranks)), v.nbytes))


def plan_of(variant: Variant) -> MemoryPlan:
    """What a variant is going to take, by its size alone."""
    return MemoryPlan(variant.nbytes, int(CACHE_SHARE * variant.nbytes), 4096)


def fits(variant: Variant, free: Headroom) -> bool:
    """Whether a variant is expected to fit; an unknown size passes."""
    return free.nbytes is None or plan_of(variant).total <= free.nbytes


Look = Callable[[Variant], Seen | None]
"""Reads a variant's header, if that can be done now."""


def choose(listing: Listing, free: Headroom, look: Look = lambda _: None) -> Variant:
    """The first of ``PREFERRED`` that fits this machine's memory, by its size and then by its header.

    Raises:
      MemoryPlanError: none fits.
      HubError: none has a type that runs.
    """
    usable = _preferred(listing)
    if not usable:
        raise HubError(f"{listing.repo}: {listing.offer()}")
    found = next((v for v in usable if fits(v, free) and _is_sound(look(v), free)), None)
    if found is None:
        smallest = min(usable, key=lambda v: v.nbytes)
        raise MemoryPlanError(
            f"{listing.repo}: even {smallest.label} needs about {plan_of(smallest).total / 1e9:.1f} GB and "
            f"does not fit {free}: use a machine with more memory; "
            f"hf:{listing.repo}:{smallest.label} downloads it all the same"
        )
    return found


def _is_sound(seen: Seen | None, free: Headroom) -> bool:
    """Whether a header has no fault, and its model fits; one that cannot be read passes."""
    if seen is None or (seen.plan is None and not seen.fault):
        return True
    return seen.plan is not None and (free.nbytes is None or seen.plan.total <= free.nbytes)


def fetch(
    listing: Listing, revision: str, variant: Variant, *, quiet: bool = False, look: Look = lambda _: None
) -> Path:
    """Downloads what is missing of a variant; returns its first file. Errors as ``pull``.

    Unless ``quiet``, what ``look`` finds in its header is said first.
    """
    snapshot = repo_folder(listing.repo) / "snapshots" / listing.commit
    missing = [file for file in variant.files if not (snapshot / file.path).is_file()]
    if missing:
        _check_disk(listing, variant, sum(file.nbytes for file in missing))
        if not quiet:
            terminal.note(*_announcement(listing, variant), *_prospect(listing, variant, look(variant)))
        _download_all(listing, variant, quiet)
    with explained(listing.repo):
        ref = repo_folder(listing.repo) / "refs" / revision
        if revision != listing.commit and (not ref.is_file() or ref.read_text() != listing.commit):
            ref.parent.mkdir(parents=True, exist_ok=True)
            ref.write_text(listing.commit)
    return snapshot / variant.files[0].path


def _announcement(listing: Listing, variant: Variant) -> list[str]:
    """Size, licence, and room on the disk."""
    shards = f" in {len(variant.files)} files" if len(variant.files) > 1 else ""
    licence = f"licence {listing.license}" if listing.license else "no licence is named"
    return [
        f"hf:{listing.repo}:{variant.label}: {format_bytes(variant.nbytes)}{shards}, {licence}, "
        f"to {repo_folder(listing.repo)} ({format_bytes(_free_disk(listing.repo))} free)"
    ]


def _prospect(listing: Listing, variant: Variant, seen: Seen | None) -> list[str]:
    """Whether it is going to run here: by the header, or by name and size where that cannot be read."""
    free = machine_memory()
    if seen is not None and seen.fault:
        return [f"note: it will not run here: {seen.fault}"]
    if seen is not None and seen.plan is not None:
        fit = "" if free.nbytes is None else "fits " if seen.plan.total <= free.nbytes else "does not fit "
        needs = f"needs {seen.plan.total / 1e9:.1f} GB with {seen.plan.context:,} tokens of context"
        plan = seen.plan.settled(free)
        is_mapped = plan.is_mapped and free.nbytes is not None and plan.needed <= free.nbytes
        aid = f"; jax on a CPU maps its weights from a file, {plan.share:.0%} fit memory" if is_mapped else ""
        return [f"{', '.join(seen.types)}; {needs}: {fit}{free}{aid}"]
    if not runs(variant.quant):
        return [f"note: {variant.label} is not known to run here; {listing.offer()}"]
    if not fits(variant, free):
        return [f"note: it needs about {plan_of(variant).total / 1e9:.1f} GB; {free}"]
    return []


def _free_disk(repo: str) -> int:
    folder = repo_folder(repo)
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    return shutil.disk_usage(folder).free


def _check_disk(listing: Listing, variant: Variant, missing: int) -> None:
    with explained(listing.repo):
        needed = max(0, missing - kept_nbytes(listing.repo))
        free = _free_disk(listing.repo)
    if needed + MIN_FREE_BYTES <= free:
        return
    smaller = [v.label for v in _preferred(listing) if v.nbytes + MIN_FREE_BYTES <= free]
    advice = f", take {smaller[0]}" if smaller else ""
    raise OutputFileError(
        f"{listing.repo} {variant.label} takes {needed / 1e9:.2f} GB more, and the disk of "
        f"{repo_folder(listing.repo)} has {free / 1e9:.2f} GB free: free some{advice}, "
        "or name another disk with HF_HUB_CACHE"
    )


def _download_all(listing: Listing, variant: Variant, quiet: bool) -> None:
    from huggingface_hub.utils import disable_progress_bars

    disable_progress_bars()
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # its retries; a failure is told in one line
    done = 0
    try:
        with (
            explained(listing.repo),
            terminal.show_progress(f"downloading {variant.label}", quiet=quiet) as report,
        ):
            for file in variant.files:
                start = done
                download(listing.repo, listing.commit, file, lambda n, s=start: report(s + n, variant.nbytes))
                done += file.nbytes
    except KeyboardInterrupt:
        kept = done + kept_nbytes(listing.repo)
        terminal.note(
            f"{format_bytes(kept)} of {format_bytes(variant.nbytes)} are kept: "
            "the same command goes on from there"
        )
        raise
