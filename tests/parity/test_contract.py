"""The contract file, the receipt's schema, and that every clause has a test that can falsify it."""

import importlib.util
import json
from pathlib import Path

import pytest

from qwen3_moe_jax.parity import contract
from qwen3_moe_jax.parity.clauses import BACKEND_CHECKS, FILE_CHECKS
from qwen3_moe_jax.parity.receipt import check_receipt, check_schema, receipt_schema

ROOT = Path(__file__).parents[2]

CLAUSES = contract.load_contract().clauses

PROMISED = {
    "PARITY-001",
    "PARITY-002",
    "PRELOAD-001",
    "INVARIANTS-001",
    "LOADGATE-001",
    "ROUTING-001",
    "QUANT-001",
    "DETERMINISM-001",
    "VRAM-001",
    "SPEED-001",
}


def test_every_promised_clause_is_there():
    assert set(CLAUSES) >= PROMISED


@pytest.mark.parametrize("id", CLAUSES)
def test_clause_is_checked_and_has_its_test(id):
    assert id in BACKEND_CHECKS or id in FILE_CHECKS
    path, _, name = CLAUSES[id].test.partition("::")
    function, _, parameter = name.rstrip("]").partition("[")
    spec = importlib.util.spec_from_file_location("clause_tests", ROOT / path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert callable(getattr(module, function))
    assert parameter == id
    assert id in module.FALSIFIED_BY
    assert id in {
        value for mark in getattr(module, function).pytestmark for value in mark.args[1]
    }  # its name


def test_bounds_by_dtype():
    clause = CLAUSES["PARITY-001"]
    assert clause.bound("float32") == clause.bound("float64") == 0.9999
    assert clause.bound("bfloat16") == 0.999
    assert clause.holds(0.9995, "bfloat16")
    assert not clause.holds(0.9995, "float32")
    assert not clause.holds(float("nan"))
    assert CLAUSES["TEXT-001"].bound("bfloat16") == 5e-3
    speed = CLAUSES["SPEED-001"]
    assert speed.bound(contract.NVIDIA) > speed.bound(contract.CPU)
    with pytest.raises(KeyError):
        speed.bound("float32")


def test_a_clause_without_a_bound_is_refused():
    with pytest.raises(ValueError, match="X-001"):
        contract._clause({"id": "X-001", "statement": "", "measure": "", "backends": [], "test": ""})


@pytest.mark.parametrize(
    ("value", "schema"),
    [
        (1.5, {"type": "integer"}),
        (True, {"type": "number"}),
        ({}, {"type": "object", "required": ["a"]}),
        ({"b": 1}, {"type": "object", "additionalProperties": False, "properties": {"a": {}}}),
        ([1, "x"], {"type": "array", "items": {"type": "integer"}}),
        ([], {"type": "array", "minItems": 1}),
        ("no", {"enum": ["yes"]}),
        ("abc", {"type": "string", "pattern": "^\\d+$"}),
        (-1, {"type": "integer", "minimum": 0}),
        (1, {"maximum": 3}),
    ],
)
def test_schema_check_refuses(value, schema):
    with pytest.raises(ValueError, match="receipt"):
        check_schema(value, schema)


def test_schema_check_accepts_what_fits():
    check_schema(
        {"a": [1, 2.5, None], "b": "7"},
        {
            "type": "object",
            "required": ["a"],
            "properties": {
                "a": {"type": "array", "items": {"type": ["number", "null"]}},
                "b": {"pattern": "7"},
            },
        },
    )


def test_schema_is_json_of_known_keywords():
    json.dumps(receipt_schema())
    with pytest.raises(ValueError, match="lacks"):
        check_receipt({})
