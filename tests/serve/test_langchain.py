"""LangChain's standard suite of chat models, over three protocols, against the scripted model."""

import asyncio
import functools
import inspect

import pytest

pytest.importorskip("langchain_tests")
pytest.importorskip("langchain_openai")
pytest.importorskip("langchain_anthropic")

from langchain_anthropic import ChatAnthropic
from langchain_openai import ChatOpenAI
from langchain_tests.integration_tests import ChatModelIntegrationTests

LOOP = asyncio.new_event_loop()
"""Of all tests: clients keep connections between them."""

NOT_SERVED = ("image", "pdf", "audio", "video", "with_model_override", "vcr")
"""What the suite has for models of other kinds."""


def _blocking(test):
    @functools.wraps(test)
    def run(*arguments, **options):
        return LOOP.run_until_complete(test(*arguments, **options))

    return run


class Suite(ChatModelIntegrationTests):
    """The suite with its coroutines run to their end, so that it needs no plugin."""

    __test__ = False
    url = ""

    def __init_subclass__(cls, **options):
        super().__init_subclass__(**options)
        cls.__test__ = True
        for name, test in inspect.getmembers(cls, inspect.iscoroutinefunction):
            if name.startswith("test_"):
                setattr(cls, name, _blocking(test))
        for name in [n for n in dir(cls) if n.startswith("test_") and any(w in n for w in NOT_SERVED)]:
            setattr(cls, name, None)

    @pytest.fixture(autouse=True)
    def _served(self, server):
        type(self).url = server.url

    @property
    def supports_json_mode(self):
        return True

    @property
    def supports_image_inputs(self):
        return False

    test_no_overrides_DO_NOT_OVERRIDE = None  # it asks for marks on what is left out here
    test_stream_time = None  # needs a benchmark and a cassette
    test_stream_events_v3 = None
    test_astream_events_v3 = None


class TestChatCompletions(Suite):
    test_anthropic_inputs = None  # tool calls in Anthropic's form

    @property
    def chat_model_class(self):
        return ChatOpenAI

    @property
    def chat_model_params(self):
        options = {"api_key": "none", "model": "scripted", "max_retries": 0, "stream_usage": True}
        return {"base_url": f"{self.url}/v1", **options}


class TestResponses(TestChatCompletions):
    @property
    def chat_model_params(self):
        return {**super().chat_model_params, "use_responses_api": True}


class TestMessages(Suite):
    test_json_mode = None  # the protocol has none

    @property
    def chat_model_class(self):
        return ChatAnthropic

    @property
    def chat_model_params(self):
        return {"base_url": self.url, "api_key": "none", "model": "scripted", "max_retries": 0}

    @property
    def supports_anthropic_inputs(self):
        return True
