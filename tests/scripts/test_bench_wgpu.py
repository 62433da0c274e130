"""What the measurement of the wgpu backend says beside its own figures."""

from types import SimpleNamespace

import pytest

from scripts import bench_wgpu


def test_ours_over_another_programs():
    own = {"prefill_tokens_per_s": 400.0, "decode_tokens_per_s": 30.0}
    peer = {"name": "another", "prefill_tokens_per_s": 800.0, "decode_tokens_per_s": 20.0}
    assert bench_wgpu.beside(own, peer) == {
        "peer": peer,
        "prefill_tokens_per_s_of_peer": 0.5,
        "decode_tokens_per_s_of_peer": 1.5,
    }


@pytest.mark.parametrize(("told", "used"), [("20000", 20000 << 20), ("1\n2", None), ("[N/A]", None)])
def test_memory_of_the_one_card(told, used, tmp_path, monkeypatch):
    program = tmp_path / "nvidia-smi"
    program.write_text(f"#!/bin/sh\nprintf '{told}'\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    runner, source = SimpleNamespace(cache_nbytes=1 << 30), SimpleNamespace(nbytes=4 << 30)
    found = bench_wgpu.memory(runner, source, 0)
    if used is None:
        assert found == {}
    else:
        assert (found["gpu_bytes"], found["file_and_cache_bytes"]) == (used, 5 << 30)
