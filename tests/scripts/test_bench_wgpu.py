"""What the measurement of the wgpu backend says beside its own figures."""

import os
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


@pytest.mark.parametrize(
    ("cards", "processes", "used", "risen"),
    [
        ("20000", "", 20000, 20000),
        ("1\\n2", "", None, None),
        ("[N/A]", "", None, None),
        ("1\\n2", "7, 5\\nPID, 30000", 30000, None),
        ("20050", "PID, 20000", 20000, 20050),
        ("1\\n2", "PID, [N/A]", None, None),
        ("1\\n2", "PID, 3\\nPID, 4", 7, None),
    ],
)
def test_memory_of_the_process_or_else_of_the_one_card(cards, processes, used, risen, tmp_path, monkeypatch):
    program = tmp_path / "nvidia-smi"
    processes = processes.replace("PID", str(os.getpid()))
    program.write_text(
        f"#!/bin/sh\ncase $1 in *-gpu=*) printf '{cards}\\n';; *) printf '{processes}\\n';; esac\n"
    )
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    runner, source = SimpleNamespace(cache_nbytes=1 << 30), SimpleNamespace(nbytes=4 << 30)
    found = bench_wgpu.memory(runner, source, 0)
    if used is None:
        assert found == {}
    else:
        assert (found["gpu_bytes"], found["file_and_cache_bytes"]) == (used << 20, 5 << 30)
        assert found.get("card_bytes") == (None if risen is None else risen << 20)
