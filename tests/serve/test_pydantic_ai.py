"""Objects as pydantic-ai asks for them: by a tool, and by a JSON schema."""

import asyncio

import pytest
from pydantic import BaseModel

pytest.importorskip("pydantic_ai")

from pydantic_ai import Agent, NativeOutput, ToolOutput
from pydantic_ai.models.openai import OpenAIChatModel
from pydantic_ai.providers.openai import OpenAIProvider


class Joke(BaseModel):
    setup: str
    punchline: str


@pytest.mark.parametrize(
    ("output", "question", "punchline"),
    [
        (ToolOutput(Joke, name="Joke"), "Tell me a joke.", "They run on electricity."),
        (NativeOutput(Joke), "Tell me a joke as JSON.", "For the milk."),
    ],
    ids=["tool", "schema"],
)
def test_an_object(server, output, question, punchline):
    provider = OpenAIProvider(base_url=f"{server.url}/v1", api_key="none")
    agent = Agent(OpenAIChatModel("scripted", provider=provider), output_type=output)

    async def ask():
        return (await agent.run(question)).output

    found = asyncio.run(ask())
    assert isinstance(found, Joke)
    assert found.punchline == punchline
