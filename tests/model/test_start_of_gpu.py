"""What a GPU's start does not wait for."""

import threading

from qwen3_moe_jax import loader


def test_a_gpu_starts_while_the_code_is_read(monkeypatch):
    """The key of every program has its hash, and no device waits for that."""
    has_device = threading.Event()
    monkeypatch.setattr(loader, "start_driver", lambda: None)
    monkeypatch.setattr(loader, "may_have_cards", lambda: True)
    monkeypatch.setattr(loader, "_start_spares", lambda: True)
    monkeypatch.setattr(loader, "cards_are_hidden_by", lambda: "")
    monkeypatch.setattr(loader, "jax_sees_gpu", has_device.set)
    seen = []
    monkeypatch.setattr(loader, "code_version", lambda: seen.append(has_device.wait(20)))
    loader.start_gpu()
    assert seen == [True]
