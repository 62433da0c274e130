"""The receipt's schema, and a check of the part of JSON Schema that it uses."""

import json
import re
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

RECEIPT_FORMAT = "qwen3-moe-jax receipt 1"

SCHEMA_PATH = Path(__file__).with_name("receipt.schema.json")

_TYPES: dict[str, tuple[type, ...]] = {
    "object": (dict,),
    "array": (list,),
    "string": (str,),
    "integer": (int,),
    "number": (int, float),
    "null": (type(None),),
}

_KEYWORDS = {
    "title",
    "type",
    "required",
    "additionalProperties",
    "properties",
    "items",
    "minItems",
    "enum",
    "pattern",
    "minimum",
}


@cache
def receipt_schema() -> dict[str, Any]:
    """The schema that ships with the package."""
    return json.loads(SCHEMA_PATH.read_text())


def check_receipt(receipt: Any) -> None:
    """Holds a receipt against the schema.

    Raises:
      ValueError: naming the first place that does not fit.
    """
    check_schema(receipt, receipt_schema())


def check_schema(value: Any, schema: Mapping[str, Any], where: str = "receipt") -> None:
    """Checks a value against the keywords of JSON Schema that are in ``_KEYWORDS``.

    Raises:
      ValueError: the value does not fit, or the schema uses another keyword.
    """
    unknown = schema.keys() - _KEYWORDS
    if unknown:
        raise ValueError(f"{where}: the schema uses {', '.join(sorted(unknown))}, which is not checked")
    types = schema.get("type", list(_TYPES))
    types = [types] if isinstance(types, str) else types
    if not any(_is_a(value, name) for name in types):
        raise ValueError(f"{where} is no {' or '.join(types)}: {value!r}")
    if "enum" in schema and value not in schema["enum"]:
        raise ValueError(f"{where} is {value!r}, not one of {schema['enum']}")
    if isinstance(value, str) and "pattern" in schema and not re.search(schema["pattern"], value):
        raise ValueError(f"{where} is {value!r}, which does not match {schema['pattern']}")
    if "minimum" in schema and isinstance(value, int | float) and value < schema["minimum"]:
        raise ValueError(f"{where} is {value}, below {schema['minimum']}")
    if isinstance(value, dict):
        _check_object(value, schema, where)
    if isinstance(value, list):
        if len(value) < schema.get("minItems", 0):
            raise ValueError(f"{where} has {len(value)} items, fewer than {schema['minItems']}")
        for i, item in enumerate(value):
            check_schema(item, schema.get("items", {}), f"{where}[{i}]")


def _is_a(value: Any, name: str) -> bool:
    return isinstance(value, _TYPES[name]) and not (isinstance(value, bool) and name in ("integer", "number"))


def _check_object(value: dict, schema: Mapping[str, Any], where: str) -> None:
    missing = [name for name in schema.get("required", ()) if name not in value]
    if missing:
        raise ValueError(f"{where} lacks {', '.join(missing)}")
    properties = schema.get("properties", {})
    for name, item in value.items():
        if name in properties:
            check_schema(item, properties[name], f"{where}.{name}")
        elif schema.get("additionalProperties", True) is False:
            raise ValueError(f"{where} has {name}, which the schema does not know")
