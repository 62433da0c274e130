"""Benchmarks, checks, profiles and makers of files; run as ``python -m scripts.NAME``.

Also what the scripts share: where the project is, and how a result is left.
"""

import json
from collections.abc import Mapping
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def leave(result: Mapping[str, object], receipt: str | Path | None) -> None:
    """Writes the result to the receipt, if one is asked for, and prints it as the last line: JSON."""
    if receipt:
        Path(receipt).write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result))
