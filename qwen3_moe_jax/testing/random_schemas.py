"""Random JSON schemas with short answers, for checks of constrained answers."""

import random
from typing import Any

LEAVES: tuple[dict[str, Any], ...] = (
    {"type": "integer", "minimum": 0, "maximum": 99},
    {"type": "boolean"},
    {"type": "string", "maxLength": 6},
    {"enum": ["red", "green", 3, None]},
    {"const": "x"},
    {"type": "string", "pattern": "^[a-c]{2,4}$"},
    {"type": "null"},
)


def random_schema(rng: random.Random, depth: int = 2) -> dict[str, Any]:
    """Objects, arrays and choices of leaves, ``depth`` deep."""
    if depth == 0 or rng.random() < 0.3:
        return rng.choice(LEAVES)
    if rng.random() < 0.3:
        return {"type": "array", "items": random_schema(rng, depth - 1), "minItems": 1, "maxItems": 2}
    if rng.random() < 0.2:
        return {"anyOf": [random_schema(rng, depth - 1), random_schema(rng, 0)]}
    names = rng.sample(["a", "b", "c d", "é"], rng.randint(1, 2))
    properties = {name: random_schema(rng, depth - 1) for name in names}
    return {"type": "object", "properties": properties, "required": names, "additionalProperties": False}
