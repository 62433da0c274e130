"""What NVIDIA's data sheets say of its cards: how fast memory moves, how fast tensor cores multiply."""

from typing import NamedTuple


class DataSheet(NamedTuple):
    """One card.

    Attributes:
      bandwidth: bytes/s of its memory.
      flops: dense 16-bit tensor-core operations/s with float32 accumulation.
    """

    bandwidth: float
    flops: float


DATA_SHEETS = {
    "H200": DataSheet(4.8e12, 989e12),
    "H100 PCIe": DataSheet(2.0e12, 756e12),
    "H100 NVL": DataSheet(3.9e12, 835e12),
    "H100": DataSheet(3.35e12, 989e12),
    "A100-SXM4-80GB": DataSheet(2.039e12, 312e12),
    "A100": DataSheet(1.555e12, 312e12),
    "L40S": DataSheet(0.864e12, 362e12),
    "L40": DataSheet(0.864e12, 181e12),
    "L4": DataSheet(0.3e12, 121e12),
    "RTX 5090": DataSheet(1.792e12, 209.5e12),
    "RTX 4090": DataSheet(1.008e12, 165.2e12),
    "RTX 3090": DataSheet(0.936e12, 71e12),
}
"""By part of the device's name, the more particular first; from data sheets and architecture white papers."""


def data_sheet(device: str) -> DataSheet | None:
    """The card that a device's name tells, or None for one that is not in the table."""
    return next((sheet for name, sheet in DATA_SHEETS.items() if name in device), None)


def peak_bandwidth(device: str) -> float | None:
    """Bytes/s that a device's memory moves, or None for one that is not in the table."""
    sheet = data_sheet(device)
    return None if sheet is None else sheet.bandwidth
