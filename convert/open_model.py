"""From a path to a source: a GGUF file or a packed checkpoint."""

import os
from pathlib import Path

from qwen3_moe_jax.convert.checkpoint_source import CheckpointSource
from qwen3_moe_jax.convert.gguf_source import GGUFSource
from qwen3_moe_jax.convert.source import READ_THREADS, ModelSource


def open_model(
    path: str | os.PathLike[str], *, check: bool = True, threads: int = READ_THREADS
) -> ModelSource:
    """Opens a ``.gguf`` file (any shard of a split one) or a packed checkpoint folder.

    Args:
      path: file or folder.
      check: refuse NaN and infinite scales and weights; for a checkpoint also
        verify the SHA-256 of everything that is read.
      threads: read and unpack on this many.

    Raises:
      ModelFileError: the file or folder cannot be used; the message says why.
    """
    path = Path(path)
    if not os.path.isdir(path):  # False, too, for a name that no file can have: the opener says so
        return GGUFSource(path, check=check, threads=threads)
    return CheckpointSource(path, check=check, threads=threads)
