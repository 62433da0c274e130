"""The environment of a child process that imports this package, from whatever folder this one does."""

import os
from pathlib import Path

_ROOT = Path(__file__).resolve().parents[2]


def child_environment(**variables: str) -> dict[str, str]:
    """This process' environment, in which a child finds this package first; ``variables`` win."""
    path = filter(None, [str(_ROOT), os.environ.get("PYTHONPATH")])
    return {**os.environ, "PYTHONPATH": os.pathsep.join(path), **variables}
