"""Pages of the documentation site that are made when it is built (a hook of mkdocs).

``reference/commands.md`` is what ``--help`` of each command says. The mark ``{{ exit_codes }}`` becomes a
table made from the code's own. So neither can be stale.
"""

import contextlib
import io
import os
from typing import Any

from mkdocs.structure.files import File, Files

from qwen3_moe_jax import cli
from qwen3_moe_jax.core.exit_codes import MEANINGS

COMMANDS_PAGE = "reference/commands.md"
HELP_WIDTH = "100"


def on_files(files: Files, config: Any) -> Files:
    """Adds the generated pages."""
    files.append(File.generated(config, COMMANDS_PAGE, content=commands_page()))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Puts the generated table in the place of its mark."""
    return markdown.replace("{{ exit_codes }}", exit_codes_table())


def commands_page() -> str:
    """What each command's ``--help`` says."""
    parts = [
        "# Commands\n\nThis page is made from `--help`. [Exit codes](exit-codes.md) and "
        "[environment variables](environment.md) have pages of their own.\n"
    ]
    parts += [f"## {name}\n\n```text\n{help_of(name)}```\n" for name in cli.COMMANDS]
    return "\n".join(parts)


def help_of(command: str) -> str:
    """The text of ``qwen3-moe COMMAND --help``, at a fixed width."""
    columns, os.environ["COLUMNS"] = os.environ.get("COLUMNS"), HELP_WIDTH
    try:
        with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.suppress(SystemExit):
            cli.main([command, "--help"])
    finally:
        del os.environ["COLUMNS"]
        if columns is not None:
            os.environ["COLUMNS"] = columns
    return out.getvalue()


def exit_codes_table() -> str:
    """Every exit code and its meaning."""
    lines = ["| code | meaning |", "|---|---|"]
    for code, meaning in MEANINGS.items():
        cell = meaning.replace("|", "\\|")
        lines.append(f"| {code.value} | {cell} |")
    return "\n".join(lines)
