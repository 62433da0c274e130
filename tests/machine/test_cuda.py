"""Asking NVIDIA's driver for free memory, with a library that answers as the driver does."""

import ctypes

import pytest

from qwen3_moe_jax.machine.cuda import free_on_card, start_driver, without_peer_access

CALLS = ["cuInit", "cuDeviceGet", "cuDevicePrimaryCtxRetain", "cuCtxPushCurrent_v2", "cuMemGetInfo_v2"]


class Driver:
    """One device, number 1, of which 123 bytes are free; ``fails`` names a call that does."""

    def __init__(self, fails: str = ""):
        self.fails, self.calls = fails, []

    def __getattr__(self, name: str):
        def call(*args):
            self.calls.append(name)
            if name == "cuDeviceGet":
                args[0]._obj.value = args[1]
            if name == "cuMemGetInfo_v2":
                args[0]._obj.value, args[1]._obj.value = 123, 456
            return 999 if name == self.fails or (name == "cuDeviceGet" and args[1] != 1) else 0

        return call


def test_free_bytes_and_the_context_is_given_back():
    driver = Driver()
    assert free_on_card(1, driver) == 123
    assert driver.calls[-2:] == ["cuCtxPopCurrent_v2", "cuDevicePrimaryCtxRelease_v2"]


@pytest.mark.parametrize("call", CALLS)
def test_a_driver_that_does_not_answer(call):
    driver = Driver(call)
    assert free_on_card(1, driver) is None
    retained = "cuCtxPushCurrent_v2" in driver.calls
    assert ("cuDevicePrimaryCtxRelease_v2" in driver.calls) == retained


def test_the_driver_is_started():
    driver = Driver()
    assert start_driver(driver)
    assert driver.calls == ["cuInit"]  # and no context of it made
    assert not start_driver(Driver("cuInit"))
    assert not start_driver(object())


def test_no_such_device_no_number_no_driver(monkeypatch):
    assert free_on_card(0, Driver()) is None
    assert free_on_card(None, Driver()) is None

    def absent(name):
        raise OSError(name)

    monkeypatch.setattr(ctypes, "CDLL", absent)
    assert free_on_card(1) is None


class Cards:
    """Four cards, the first two and the last two linked."""

    def cuInit(self, _):
        return 0

    def cuDeviceGet(self, device, ordinal):
        device._obj.value = 10 + ordinal
        return ordinal > 3

    def cuDeviceCanAccessPeer(self, can, one, other):
        can._obj.value = (one.value - 10) // 2 == (other.value - 10) // 2
        return 0


def test_cards_that_cannot_write_to_each_other():
    assert without_peer_access([0, 1], Cards()) is None
    assert without_peer_access([2], Cards()) is None
    assert without_peer_access([0, 1, 2, 3], Cards()) == (0, 2)
    assert without_peer_access([3, 4], Cards()) == (3, 4)  # one that the driver does not know
    assert without_peer_access([0, 1], Driver("cuInit")) == (0, 1)
    assert without_peer_access([0, 1], object()) == (0, 1)
