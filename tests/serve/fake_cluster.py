"""A front of a cluster over engines that are functions, and how it is asked in its own loop."""

import asyncio

import httpx

from qwen3_moe_jax.serve.cluster.forward import make_front
from qwen3_moe_jax.serve.cluster.wire import Head, Taken
from qwen3_moe_jax.serve.settings import Settings
from tests.serve.bodies import BODIES

JSON = Head(200, [(b"content-type", b"application/json")])


class FakeEngines:
    """Engines of two names, each a function of a request that gives pieces; ``asked``: who was wanted."""

    def __init__(self, *answers, room=100, takes=None):
        """``takes``: how many it has at a time, if that is not ``room``."""
        self.room, self._places = room, asyncio.Semaphore(takes or room)
        self.answers, self.asked, self.held = list(answers), [], asyncio.Event()
        self.held.set()

    async def ask(self, ask, engine):
        self.asked.append(engine)
        answer = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
        await self.held.wait()
        name = engine or f"e{len(self.asked) % 2}"
        async with self._places:
            yield Taken(name, 1024, 4096)
            async for piece in answer(ask):
                yield piece

    async def states(self):
        return {"RUNNING": 2}


async def whole(ask):
    yield JSON
    yield b'{"a": '
    yield b"1}"


def post(engines, body=None, path="/v1/completions", settings=None, address="127.0.0.1", **headers):
    """The reply of a front."""
    return asyncio.run(apost(make_front(engines, settings or Settings()), body, path, address, **headers))


async def apost(app, body=None, path="/v1/completions", address="127.0.0.1", **headers):
    transport = httpx.ASGITransport(app=app, client=(address, 1))
    async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
        return await client.post(path, json=body or BODIES[path], headers=headers)


async def get(app, path):
    transport = httpx.ASGITransport(app=app)
    async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
        return await client.get(path)


def app_requests(reply):
    return sum(reply.json()["requests"].values())
