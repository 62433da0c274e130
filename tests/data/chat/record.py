"""Records ``goldens.json``: what Hugging Face Transformers renders for ``cases.json``.

Recorded with Transformers 5.23.0 and Jinja 3.1.6, outside the project's own
environment, which has no Transformers: ``python tests/data/chat/record.py``.
"""

import json
from pathlib import Path

from transformers.utils.chat_template_utils import render_jinja_template

HERE = Path(__file__).parent
TEMPLATES = ("Qwen3", "Qwen3-Coder")


def main() -> None:
    """Renders every case with both templates."""
    cases = json.loads((HERE / "cases.json").read_text())
    tools = json.loads((HERE / "tools.json").read_text())
    goldens: dict[str, dict[str, str]] = {}
    for template in TEMPLATES:
        source = (HERE.parent / f"{template}.jinja").read_text()
        goldens[template] = {}
        for name, case in cases.items():
            rest = {key: value for key, value in case.items() if key not in ("messages", "tools")}
            rest.setdefault("add_generation_prompt", True)
            texts, _ = render_jinja_template(
                conversations=[case["messages"]],
                tools=tools[case["tools"]] if "tools" in case else None,
                chat_template=source,
                **rest,
            )
            goldens[template][name] = texts[0]
    text = json.dumps(goldens, indent=1, ensure_ascii=False)
    (HERE / "goldens.json").write_text(text + "\n")


if __name__ == "__main__":
    main()
