"""A module that imports ``no_races`` fails where Pallas' interpreter finds a race, which it only prints."""

import pytest


@pytest.fixture(autouse=True)
def no_races(capfd):
    yield
    assert "RACE DETECTED" not in capfd.readouterr().out
