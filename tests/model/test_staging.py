"""Buffers that a GPU reads by itself: told to it once, and taken back when all has arrived."""

from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from threading import Barrier
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from qwen3_moe_jax.convert.open_model import open_model
from qwen3_moe_jax.jax_backend import device_load
from qwen3_moe_jax.jax_backend.params import GPU_ROLES, load_on_device
from qwen3_moe_jax.jax_backend.staging import Staging
from qwen3_moe_jax.testing.random_models import SMALL, write_random_gguf

CPU = jax.devices("cpu")[0]
NBYTES = 5000


class Client:
    """What a GPU's client is asked."""

    def __init__(self, fails: bool = False):
        self.known, self.fails, self.told = {}, fails, 0

    def dma_map(self, address: int, size: int) -> None:
        self.told += 1
        if self.fails:
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: no memory may be locked")
        self.known[address] = size

    def dma_unmap(self, address: int) -> None:
        del self.known[address]


def gpu(client: object) -> SimpleNamespace:
    return SimpleNamespace(platform="gpu", client=client)


def test_each_thread_has_one_buffer_that_the_card_knows():
    client, both = Client(), Barrier(2)

    def addresses(staging):
        found = [staging.buffer().ctypes.data for _ in range(3)]
        both.wait(60)
        return found

    with Staging(gpu(client), NBYTES) as staging:
        with ThreadPoolExecutor(2) as pool:
            first, second = pool.map(addresses, [staging] * 2)
        assert client.known == {first[0]: NBYTES, second[0]: NBYTES}, "also when their threads have ended"
    assert len({*first, *second}) == 2
    assert not client.known


def test_it_is_taken_back_after_an_error():
    client = Client()
    with suppress(KeyError), Staging(gpu(client), NBYTES) as staging:
        staging.buffer()
        raise KeyError
    assert (client.told, client.known) == (1, {})


@pytest.mark.parametrize("client", [Client(fails=True), SimpleNamespace(), None])
def test_what_cannot_be_told_is_sent_as_before(client):
    """A system that locks no memory, an older JAX."""
    with Staging(gpu(client), NBYTES) as staging:
        buffer = staging.buffer()
        buffer[:] = 7
        assert (buffer.shape, buffer.dtype) == ((NBYTES,), np.uint8)


def test_a_cpu_is_told_nothing():
    client = Client()
    with Staging(SimpleNamespace(platform="cpu", client=client), NBYTES) as staging:
        staging.buffer()
    assert not client.told


def test_a_load_takes_buffers_back_when_all_has_been_sent(tmp_path, monkeypatch):
    write_random_gguf(tmp_path / "small.gguf", SMALL, mix="q8_0")
    monkeypatch.setattr(device_load, "PIECE_BYTES", 50_000)
    done = []

    class Noted(Staging):
        def __exit__(self, *error):
            done.append("back")
            super().__exit__(*error)

    send = jax.device_put

    def noted(value, *args, **options):
        found = send(value, *args, **options)
        done.append("sent")
        return found

    monkeypatch.setattr(device_load, "Staging", Noted)
    with open_model(tmp_path / "small.gguf") as source:
        monkeypatch.setattr(device_load.jax, "device_put", noted)
        load_on_device(source, GPU_ROLES, CPU)
    assert done.count("back") == 1
    assert done.index("back") > 10
    assert done[done.index("back") :].count("sent") <= 1, "the norms alone"
