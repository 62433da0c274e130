"""Which GPU WebGPU offers, and the settings that suit its kind.

``python -m qwen3_moe_jax.wgpu_backend.adapter`` prints what was found.
"""

import os
import sys
import tempfile
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from qwen3_moe_jax.core import terminal
from qwen3_moe_jax.core.errors import BackendUnavailableError

ADAPTER_VARIABLE = "QWEN3_MOE_WGPU_ADAPTER"
"""Environment variable: part of the summary of the adapter to use."""

INSTALL_HINT = (
    "install a Vulkan driver (on Debian and Ubuntu "
    "`apt install mesa-vulkan-drivers libvulkan1` gives one in software)"
)

_KINDS = {
    "DiscreteGPU": "discrete GPU",
    "IntegratedGPU": "integrated GPU",
    "CPU": "software (runs on the CPU)",
    "Unknown": "unknown kind",
}


@dataclass(frozen=True)
class Block:
    """Sizes of a kernel of tiles.

    Attributes:
      rows, tokens: of the tile of one workgroup.
      lane_rows, lane_tokens: of the block whose sums one lane keeps in registers.
    """

    rows: int
    tokens: int
    lane_rows: int
    lane_tokens: int

    @property
    def lanes(self) -> int:
        """Of a workgroup: subgroups of 8 blocks in rows by 4 in tokens."""
        return self.rows // self.lane_rows * (self.tokens // self.lane_tokens)


@dataclass(frozen=True)
class Tiles(Block):
    """Sizes of tile.wgsl, which computes long prompts, and what is chosen with them.

    Attributes:
      attention_tokens: tokens that a workgroup of attention.wgsl takes; attend_tile.wgsl has its own.
      from_tokens: chunks of fewer tokens are left to the kernel of narrow tiles.
      dots: of tile_bytes.wgsl, which multiplies Q4_K, Q5_K and Q6_K by dots of four bytes, with activations
        that are rounded to 16 bits; None leaves them to tile.wgsl, in float32.
    """

    attention_tokens: int = 1
    from_tokens: int = 64
    dots: Block | None = None

    @property
    def nbytes(self) -> int:
        """Of shared memory: 32 columns of float32 for each row and token."""
        return 4 * 32 * (self.rows + self.tokens)


@dataclass(frozen=True)
class Vectors:
    """Settings of the kernels of one token (vectors.py).

    Attributes:
      workgroup: invocations per workgroup of the products.
      lanes, rows: most invocations that share a row of weights, and rows that they compute together.
      router_lanes: the same for the router, one row each.
      team: invocations for each choice of experts in the sum of their outputs.
      team_lanes, team_rows: as lanes and rows, there.
      subgroup: invocations of every subgroup, where the device exchanges values inside them.
      tile: cache positions that a workgroup of attention takes at a time; four lanes each.
      parts: the most parts into which attention cuts the cache.
    """

    workgroup: int = 128
    lanes: int = 32
    rows: int = 2
    router_lanes: int = 32
    team: int = 32
    team_lanes: int = 4
    team_rows: int = 1
    subgroup: int = 32
    tile: int = 64
    parts: int = 32


@dataclass(frozen=True)
class Tuning:
    """Settings of the kernels.

    Attributes:
      workgroup: invocations per workgroup of the matrix kernels.
      lanes: most invocations that share one row of weights; a power of two.
      decode_rows: rows of weights that one group of lanes computes for one token.
      prefill_rows, prefill_tokens: the same for a tile of tokens.
      vector_workgroup: invocations per workgroup of norms, router, embedding and merge.
      head_workgroup: invocations per workgroup of RoPE and attention.
      heads: most query heads of one KV head that a workgroup of attention computes together.
      sample_workgroup: invocations of the one workgroup that samples.
      chunk: tokens of a prompt that are computed together.
      decode_span, prefill_span: cache positions that one workgroup of attention reads.
      tokens_per_submit: most tokens between two read-backs.
      submits_in_flight: batches of tokens that are queued before the first is read back.
      tiles: for long prompts; None leaves them to the kernel of narrow tiles.
      vectors: for one token; None leaves it to the kernels of prompts.
    """

    workgroup: int
    lanes: int
    decode_rows: int
    prefill_rows: int
    prefill_tokens: int
    vector_workgroup: int
    head_workgroup: int
    heads: int
    sample_workgroup: int
    chunk: int
    decode_span: int
    prefill_span: int
    tokens_per_submit: int
    submits_in_flight: int
    tiles: Tiles | None = None
    vectors: Vectors | None = None


_DOTS = Block(rows=64, tokens=32, lane_rows=4, lane_tokens=4)

_GPU = Tuning(
    workgroup=64,
    lanes=16,
    decode_rows=2,
    prefill_rows=4,
    prefill_tokens=8,
    vector_workgroup=256,
    head_workgroup=64,
    heads=2,
    sample_workgroup=256,
    chunk=512,
    decode_span=128,
    prefill_span=1 << 20,
    tokens_per_submit=2,
    submits_in_flight=3,
    tiles=Tiles(rows=128, tokens=64, lane_rows=4, lane_tokens=8, attention_tokens=4, dots=_DOTS),
    vectors=Vectors(),
)

# A software adapter runs a workgroup as SIMD vectors of 8 lanes. One lane per row needs no reduction,
# and spans stay short enough for drivers that end an invocation's loops after 65,535 iterations.
_SOFTWARE = Tuning(
    workgroup=8,
    lanes=1,
    decode_rows=4,
    prefill_rows=4,
    prefill_tokens=8,
    vector_workgroup=8,
    head_workgroup=8,
    heads=2,
    sample_workgroup=256,
    chunk=256,
    decode_span=512,
    prefill_span=4096,
    tokens_per_submit=8,
    submits_in_flight=1,
)

TUNINGS: dict[str, Tuning] = {"DiscreteGPU": _GPU, "IntegratedGPU": _GPU, "Unknown": _GPU, "CPU": _SOFTWARE}
"""Settings by WebGPU's adapter type."""


SHARED_BYTES = 16384
"""Of a workgroup: what WebGPU guarantees everywhere."""
MAX_SHARED_BYTES = 49152
"""The most that kernels ask for where an adapter offers more."""

SMALL_TILES = Tiles(rows=64, tokens=64, lane_rows=4, lane_tokens=8, attention_tokens=2, dots=_DOTS)
"""What SHARED_BYTES hold."""


VENDORS_OF_DOTS = (0x10DE,)
"""PCI's number of NVIDIA, whose GPUs have an instruction for dots of four bytes; others were not measured."""


@dataclass(frozen=True)
class AdapterReport:
    """What is known of one adapter before a device is made.

    Attributes:
      name: the device's name.
      summary: name, kind and API on one line; what ``ADAPTER_VARIABLE`` is matched with.
      type: WebGPU's adapter type: "DiscreteGPU", "IntegratedGPU", "CPU" or "Unknown".
      api: "Vulkan", "Metal", "D3D12" or "OpenGL".
      driver: the driver's description.
      software: whether it runs on the CPU.
      vendor: PCI's number of who made it.
      limits: the limits that this backend looks at.
      features: native and WebGPU features.
    """

    name: str
    summary: str
    type: str
    api: str
    driver: str
    software: bool
    vendor: int
    limits: dict[str, int]
    features: tuple[str, ...]

    def __str__(self) -> str:
        kind = _KINDS.get(self.type, self.type)
        binding = self.limits["max-storage-buffer-binding-size"] / 2**20
        return (
            f"{self.name}: {kind}, {self.api}, driver {self.driver or 'unknown'}, "
            f"bindings up to {binding:.0f} MiB, "
            f"{self.limits['max-compute-workgroup-storage-size']} bytes of shared memory"
        )

    def to_json(self) -> dict[str, object]:
        """Plain values, for ``--json``."""
        return {f.name: getattr(self, f.name) for f in fields(self)}


def tuning_for(report: AdapterReport, *, exact: bool = False) -> Tuning:
    """The settings of an adapter: those of its kind, with tiles that its shared memory holds.

    WebGPU has dots of bytes everywhere and does not tell where they are one instruction: the vendor does.
    ``exact`` leaves them out.
    """
    tuning = TUNINGS.get(report.type, TUNINGS["Unknown"])
    tiles = tuning.tiles
    if not tiles:
        return tuning
    if tiles.nbytes > report.limits["max-compute-workgroup-storage-size"]:
        tiles = SMALL_TILES
    has_dots = report.vendor in VENDORS_OF_DOTS and not exact
    return replace(tuning, tiles=replace(tiles, dots=tiles.dots if has_dots else None))


_LIMITS = (
    "max-storage-buffer-binding-size",
    "max-buffer-size",
    "max-storage-buffers-per-shader-stage",
    "max-compute-workgroup-storage-size",
    "max-compute-invocations-per-workgroup",
    "max-compute-workgroups-per-dimension",
    "min-storage-buffer-offset-alignment",
)


def report_on(adapter: Any) -> AdapterReport:
    """Describes a ``wgpu.GPUAdapter``."""
    info = adapter.info
    return AdapterReport(
        name=str(info["device"]),
        summary=str(adapter.summary),
        type=str(info["adapter_type"]),
        api=str(info["backend_type"]),
        driver=str(info["description"]),
        software=info["adapter_type"] == "CPU",
        vendor=int(info.get("vendor_id", 0)),
        limits={name: int(adapter.limits[name]) for name in _LIMITS},
        features=tuple(sorted(adapter.features)),
    )


GPU_FILES = ("dri/renderD*", "nvidia[0-9]*", "dxg", "kgsl-3d0", "mali*")
"""Below /dev of a Linux with a GPU: the kernel's own drivers, NVIDIA's, Windows' (WSL), Qualcomm's, ARM's."""


def may_have_hardware(devices: Path = Path("/dev")) -> bool:
    """Whether there can be an adapter that is no software; costs nothing, where asking for it takes 0.6 s.

    Args:
      devices: the folder of device files.
    """
    if not sys.platform.startswith("linux"):
        return True
    return any(next(devices.glob(pattern), None) is not None for pattern in GPU_FILES)


def list_adapters() -> list[AdapterReport]:
    """Every adapter of this machine, the preferred one first; empty where there is none, or no wgpu."""
    try:
        return sorted((report_on(a) for a in _wgpu().gpu.enumerate_adapters_sync()), key=_preference)
    except (BackendUnavailableError, RuntimeError):
        return []


def probe(wanted: str | None = None) -> tuple[Any, AdapterReport]:
    """Chooses an adapter.

    Hardware comes before software, and among those Vulkan, Metal and DirectX 12 before OpenGL.

    Args:
      wanted: part of an adapter's summary, in any case; default the environment
        variable ``QWEN3_MOE_WGPU_ADAPTER``.

    Returns:
      The ``wgpu.GPUAdapter`` and its description.

    Raises:
      BackendUnavailableError: there is no adapter, or none that matches ``wanted``.
    """
    wanted = wanted or os.environ.get(ADAPTER_VARIABLE) or ""
    try:
        adapters = _wgpu().gpu.enumerate_adapters_sync()
    except RuntimeError as error:
        raise BackendUnavailableError(f"WebGPU does not start here ({error}): {INSTALL_HINT}") from error
    if not adapters:
        raise BackendUnavailableError(f"WebGPU finds no graphics adapter: {INSTALL_HINT}")
    found = [(a, report_on(a)) for a in adapters]
    matching = [(a, r) for a, r in found if wanted.lower() in r.summary.lower()]
    if not matching:
        names = "; ".join(r.summary for _, r in found)
        raise BackendUnavailableError(f"no graphics adapter matches {wanted!r}: choose one of {names}")
    return min(matching, key=lambda pair: _preference(pair[1]))


def _preference(report: AdapterReport) -> tuple[bool, bool, bool]:
    return report.software, report.api.startswith("OpenGL"), report.type != "DiscreteGPU"


def _wgpu() -> Any:
    # Vulkan's loader complains on standard error where this is not set, and needs no more than a folder.
    os.environ.setdefault("XDG_RUNTIME_DIR", tempfile.gettempdir())
    try:
        import wgpu
    except (ImportError, OSError) as error:
        raise BackendUnavailableError(
            f"the package wgpu cannot be used ({error}): pip install wgpu"
        ) from error
    return wgpu


def _main() -> None:
    reports = list_adapters()
    for report in reports:
        terminal.show(report)
    if not reports:
        terminal.show(f"no graphics adapter: {INSTALL_HINT}")


if __name__ == "__main__":
    _main()
