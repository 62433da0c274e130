"""The decode kernel's shared memory by name: every batch's names, and each column's sum."""

import json
import sys

import pytest

pytest.importorskip("jax.experimental.pallas.mosaic_gpu")

from qwen3_moe_jax.kernels_pallas.gpu import cards
from scripts import shared_memory
from scripts._receipts import receipt


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


def test_the_receipt_of_cards_is_what_the_kernel_takes(monkeypatch, capsys, tmp_path):
    path = tmp_path / "cards.json"
    monkeypatch.setattr(sys, "argv", ["shared_memory", "--cards", "--receipt", str(path)])
    shared_memory.main()
    *lines, last = capsys.readouterr().out.splitlines()
    rows = json.loads(last)["cards"]
    assert len(lines) == len(rows) == sum(len(c.multiprocessors) for c in cards.capabilities().values())
    assert rows == json.loads(path.read_text())["cards"] == receipt("kernel_sequences")["cards"]
