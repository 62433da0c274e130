"""Benchmarks, checks, profiles and makers of files; run as ``python -m scripts.NAME``.

Also what the scripts share: where the project is, and the environment in which a child process finds it.
"""

import os
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def child_environment(**variables: str) -> dict[str, str]:
    """This process' environment for a child that imports this project from any folder; ``variables`` win."""
    path = filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])
    return {**os.environ, "PYTHONPATH": os.pathsep.join(path), **variables}
