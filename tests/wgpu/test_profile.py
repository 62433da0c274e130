"""The profile of a load, a token and a prompt: its tables add up, with timestamps and without."""

import json

import pytest

from tests.wgpu import gpu_work

SMALL_RUN = ["--context", "64", "--prompt-tokens", "12"]
LAYERS = 6


@pytest.mark.parametrize("timestamps", [True, False])
def test_every_dispatch_is_in_the_tables(gpu, timestamps):
    *lines, last = gpu(gpu_work.profiled, SMALL_RUN, timestamps=timestamps).splitlines()
    result = json.loads(last)
    assert result["timestamps"] == timestamps
    for name in ("token", "prompt"):
        found = result[name]
        assert found["dispatches"] > 5 * LAYERS
        assert found["wall_us"] > 0
        assert all(value >= 0 for value in found["host"].values())
        assert bool(found["kernels"]) == timestamps
        if timestamps:
            assert sum(row["count"] for row in found["kernels"]) == found["dispatches"]
            assert sum(row["us"] for row in found["kernels"]) == pytest.approx(found["us"])
            assert 0 < found["bytes"] < result["bytes"]  # no pass chooses every expert
    assert 0.98 * result["bytes"] < result["steps"]["submit a piece"]["bytes"] <= result["bytes"]
    assert any("read, check, copy" in line for line in lines)
    assert timestamps or any("no timestamps" in line for line in lines)
