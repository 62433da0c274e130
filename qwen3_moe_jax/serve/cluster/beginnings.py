"""What a request's prompt begins with, as bytes that two requests share if their prompts do.

A front has no tokenizer and no model file. It knows a prompt by the text of its fields, in the order in which
templates write them. A wrong guess costs a prompt that is read again.
"""

import json
from collections.abc import Mapping
from typing import Any

import msgspec

from qwen3_moe_jax.serve.engine.affinity import blocks_of_bytes
from qwen3_moe_jax.serve.text_model import without_billing_header

FIELDS = ("tools", "system", "instructions", "messages", "input", "prompt", "input_prefix")
"""Of requests of all protocols, what prompts begin with first."""


def blocks_of_body(body: bytes, key: str) -> list[int]:
    """Hashes of what a request's prompt begins with (``affinity``); none where nothing is shared, or if the
    body is no request."""
    try:
        value = msgspec.json.decode(body)
    except (ValueError, RecursionError):
        return []
    if not isinstance(value, dict) or value.get("cache_prompt") is False:
        return []
    return blocks_of_bytes(beginning_of(value).encode(), f"{key}\0{value.get('cache_salt') or ''}")


def beginning_of(body: Mapping[str, Any]) -> str:
    """The fields of a request that its prompt begins with, as text."""
    parts = {name: body[name] for name in FIELDS if name in body}
    if "system" in parts:
        parts["system"] = _without_billing(parts["system"])
    return "".join(json.dumps(part) for part in parts.values())


def _without_billing(system: Any) -> Any:
    if isinstance(system, str):
        return without_billing_header(system)
    if isinstance(system, list):
        return [_without_billing(block.get("text")) if isinstance(block, dict) else block for block in system]
    return system
