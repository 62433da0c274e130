"""Pictures of the chat page for the documentation: a scripted model, a headless Chromium, two sizes.

    python -m scripts.record_page [--folder docs/guides/pictures]

Writes page-wide.png and page-360.png. What the page does is held by tests/serve/test_page.py.
"""

import argparse
import json
import tempfile
from pathlib import Path

from qwen3_moe_jax.serve.settings import Settings
from qwen3_moe_jax.testing import browser as chromium
from qwen3_moe_jax.testing.http_server import quick_start, running
from qwen3_moe_jax.testing.scripted_model import build_scripted_model

TOOLS = [{"name": "get_current_weather", "parameters": {"type": "object", "properties": {}}}]
TALK = ("Think first: what is 17 and 4? [[thinking]]", "How warm is it in San Francisco?")
IS_QUIET = (
    "document.getElementById('stop').hidden && document.querySelectorAll('.assistant').length === args[0]"
)
IS_PAINTED = (
    "new Promise((go) => requestAnimationFrame(() => requestAnimationFrame(() => setTimeout(go, 200))))"
)
IS_DRAWN = "document.getElementById('heatmap').height > 1"


def say(page: chromium.Browser, text: str, answers: int) -> None:
    """A message and its whole answer."""
    page.run("document.getElementById('text').focus()")
    page.write(text)
    page.press("Enter")
    page.until(IS_QUIET, answers)


def talk(page: chromium.Browser) -> None:
    """A thought, a call and its result, coloured code."""
    page.run("document.getElementById('experts').open = true")
    page.run("document.getElementById('tools').value = args[0]", json.dumps(TOOLS))
    for number, text in enumerate(TALK, 1):
        say(page, text, number)
    page.run("document.querySelector('details.call input').focus()")
    page.write("18 °C, rain")
    page.press("Enter")
    page.until(IS_QUIET, 3)
    page.run(
        "[...document.querySelectorAll('.assistant button')].at(-2).click()"
    )  # again: no program is made
    page.until(IS_QUIET, 3)
    page.until(IS_DRAWN)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--folder", type=Path, default=Path("docs/guides/pictures"))
    folder = parser.parse_args().folder
    program = chromium.find()
    if program is None:
        raise SystemExit("no Chromium on this machine: install the package chromium")
    with tempfile.TemporaryDirectory() as home, chromium.opened(program) as page:
        model = Path(home) / "model.gguf"
        model.write_bytes(build_scripted_model(layers=12, experts=32))
        with running(Settings(port=0, name="scripted model"), quick_start(model)) as server:
            page.size(900, 800)
            page.open(server.url)
            page.until("document.getElementById('model').textContent === 'scripted model'")
            talk(page)
            page.run("document.querySelector('details.thinking').open = true")
            page.run("document.getElementById('talk').scrollTop = 0")
            page.run(IS_PAINTED)
            page.picture(folder / "page-wide.png")
            page.size(360, 740)
            page.run(IS_PAINTED)
            page.run("document.getElementById('talk').scrollTop = 1e9")
            page.run(IS_PAINTED)
            page.picture(folder / "page-360.png")
    print(f"{folder}/page-wide.png, {folder}/page-360.png")


if __name__ == "__main__":
    main()
