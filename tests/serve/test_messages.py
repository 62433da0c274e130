"""Messages of every protocol, whatever JSON has in the place of a role or a part."""

import pytest

from qwen3_moe_jax.serve.http.responses import from_responses
from qwen3_moe_jax.serve.messages import from_chat, text_of
from qwen3_moe_jax.text.chat_template import MessageError

NO_ROLES = [None, 1, "", "tools", ["user"], {"user": 1}]


@pytest.mark.parametrize("role", NO_ROLES, ids=repr)
def test_a_role_that_is_none_is_named(role):
    with pytest.raises(MessageError, match=r"messages\[0\].role must be one of"):
        from_chat([{"role": role, "content": "x"}])
    with pytest.raises(MessageError, match=r"input\[0\].role must be one of"):
        from_responses([{"role": role, "content": "x"}], None)


@pytest.mark.parametrize("part", [{"type": "refusal", "text": "x"}, {"type": ["text"], "text": "x"}, {}, 1])
def test_a_part_that_is_no_text_is_named(part):
    with pytest.raises(MessageError, match=r"content\[0\]: the model reads text only"):
        text_of([part], "content")


def test_parts_of_text_are_joined():
    parts = ["a", {"type": "text", "text": "b"}, {"type": "refusal", "refusal": "c"}]
    assert text_of(parts, "content") == "abc"
