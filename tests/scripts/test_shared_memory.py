"""The decode kernel's shared memory by name: every batch's names, and each column's sum."""

import json
import sys

import pytest

pytest.importorskip("jax.experimental.pallas.mosaic_gpu")

from scripts import shared_memory


@pytest.mark.parametrize("kernels", ["hopper", "portable"])
def test_columns_add_up(kernels, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["shared_memory", "--kernels", kernels])
    shared_memory.main()
    head, *lines, last = capsys.readouterr().out.splitlines()
    batches = head.split()[1:]
    rows = {line[:22].strip(): [int(v) for v in line[22:].split()] for line in lines}
    total = rows.pop("bytes per block")
    assert [sum(column) for column in zip(*rows.values(), strict=True)] == total
    assert json.loads(last)["bytes"] == dict(zip(batches, total, strict=True))
