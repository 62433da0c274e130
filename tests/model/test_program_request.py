"""What a request for a program may hold: nothing of another package is named, made, called or imported."""

import sys
import uuid

import pytest

from qwen3_moe_jax.jax_backend.program_request import decode, encode


@pytest.mark.parametrize(
    "value",
    [
        {"object": ["os:system", {}]},
        {"object": ["subprocess:Popen", {"args": "true"}]},
        {"object": ["qwen3_moe_jax.jax_backend.programs:os.system", {}]},
        {"object": ["qwen3_moe_jax.jax_backend.programs:pickle.loads", {}]},
        {"object": ["qwen3_moe_jax.jax_backend.kv_cache:KVCache", {"no_such_field": 1}]},
        {"object": ["qwen3_moe_jax.jax_backend.programs:forget", {}]},  # a function, which would be called
        {"object": ["this:d", {}]},  # which prints when it is imported
        {"enum": ["qwen3_moe_jax.convert.ggml_types:GGMLType", "NO_SUCH"]},
        {"call": "true"},
        {"map": [], "list": []},
        [1],
    ],
)
def test_what_names_another_package_is_refused(value):
    with pytest.raises(ValueError, match="request|package|there is no|dataclass"):
        decode(value)
    assert "this" not in sys.modules


def test_what_no_other_process_can_make_is_not_sent():
    with pytest.raises(TypeError, match="cannot be sent"):
        encode({"change": lambda x: x})
    with pytest.raises(TypeError, match="not of this package"):
        encode(uuid.SafeUUID.safe)
