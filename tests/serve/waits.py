"""Waiting for what another thread or process makes true."""

import time


def until(condition):
    """Waits for what must become true; a limit for hangs alone."""
    end = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < end, "it does not become true"
        time.sleep(0.005)
