"""The ten faults in the wgpu backend, in a process of its own."""

import json
import os
import subprocess
import sys

import pytest

from qwen3_moe_jax.machine.child_environment import child_environment
from qwen3_moe_jax.testing.fault_list import FAULTS


def test_every_fault_in_wgpu_is_named():
    done = subprocess.run(
        [sys.executable, "-m", "scripts.plant_faults", "--backend", "wgpu", "--tokens", "0"],
        capture_output=True,
        text=True,
        env=child_environment(OPENBLAS_NUM_THREADS="1"),
        check=False,
    )
    if "BackendUnavailableError" in done.stderr and os.environ.get("QWEN3_MOE_REQUIRE_WGPU") != "1":
        pytest.skip(done.stderr.strip().splitlines()[-1])
    assert done.returncode == 0, done.stdout + done.stderr
    counts = json.loads(done.stdout.strip().splitlines()[-1])
    assert counts[0]["bisect_named"] == len(FAULTS)
