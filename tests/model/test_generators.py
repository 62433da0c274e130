"""A generator in the place of a list counts as its items: what is checked is what is used."""

from dataclasses import replace

import numpy as np
import pytest

import qwen3_moe_jax as q3
from qwen3_moe_jax.core.runner_arguments import checked_forward
from qwen3_moe_jax.inspection.interventions import Intervention
from qwen3_moe_jax.inspection.trace import trace

TOOL = {"type": "function", "function": {"name": "look", "parameters": {"type": "object"}}}
CHAT = [{"role": "user", "content": "x"}]
IDS = [5, 6, 7, 8]


class Takes:
    """A runner that is said to take every option."""

    def __init__(self, runner):
        self.config, self.max_context, self.name = runner.config, runner.max_context, "any"
        self.is_closed = False
        self.capabilities = replace(runner.capabilities, beside=True, interventions=True)


@pytest.fixture(scope="module")
def model():
    with q3.load(backend="reference", gate=False, max_context=64) as found:
        yield found


def test_stop_strings(model):
    whole = model.generate("def fib(n):", max_tokens=8, temperature=0)
    stop = whole[3:5]
    cut = model.generate("def fib(n):", max_tokens=8, temperature=0, stop=[stop])
    assert cut == whole[: whole.index(stop)]
    assert model.generate("def fib(n):", max_tokens=8, temperature=0, stop=iter([stop])) == cut
    several = model.generate_batch(["def fib(n):"] * 2, max_tokens=8, temperature=0, stop=iter([stop]))
    assert several == [cut, cut]


def test_tools(model):
    template = "{% for t in tools or [] %}{{ t.function.name }} {% endfor %}{{ messages[0].content }}"
    model.chat_template = template
    try:
        count = model.generate(CHAT, tools=[TOOL], max_tokens=1).prompt_tokens
        assert count > model.generate(CHAT, max_tokens=1).prompt_tokens
        assert model.generate(CHAT, tools=iter([TOOL]), max_tokens=1).prompt_tokens == count
        several = model.generate_batch([CHAT, CHAT], tools=iter([TOOL]), max_tokens=1)
        assert [answer.prompt_tokens for answer in several] == [count, count]
    finally:
        model.chat_template = None


@pytest.mark.parametrize("name", ["interventions", "layers", "chunk_sizes", "beside", "capture"])
def test_options_of_forward(model, name):
    values = {
        "interventions": [Intervention("l_out", lambda value, layer: value, None)],
        "layers": [0, 1],
        "chunk_sizes": [2, 2],
        "beside": [np.array([1, 2, 3], np.int32)],
        "capture": ["l_out"],
    }[name]
    runner = Takes(model.runner)
    wanted = vars(checked_forward(runner, IDS, **{name: values}))
    found = vars(checked_forward(runner, IDS, **{name: iter(values)}))
    assert all(np.array_equal(found[field], wanted[field]) for field in wanted)
    assert len(found[name]) == len(values)


def test_stages_of_a_trace(model):
    assert trace(model.runner, IDS, iter(["l_out"])).forward.stages.keys() == {
        ("l_out", layer) for layer in range(model.config.num_hidden_layers)
    }


@pytest.mark.parametrize("layers", [[1.0], ["0"], [True], [-1], [99]])
def test_layers_that_are_none_are_named(model, layers):
    with pytest.raises(ValueError, match="layers must be some of 0 to"):
        model.forward(IDS, layers=layers)
