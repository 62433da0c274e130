"""The file of API keys."""

from qwen3_moe_jax.core.errors import OptionError
from qwen3_moe_jax.core.input_file import read_text


def read_keys(path: str | None) -> tuple[str, ...]:
    """The keys in a file: its lines that are not empty and no comments.

    Raises:
      OptionError: there is none, or the file cannot be read.
    """
    if path is None:
        return ()
    try:
        lines = [line.strip() for line in read_text(path).splitlines()]
    except (OSError, ValueError) as error:
        raise OptionError(f"--api-key-file {error}") from error
    keys = tuple(line for line in lines if line and not line.startswith("#"))
    if not keys:
        raise OptionError(f"--api-key-file {path}: there is no key in it")
    return keys
