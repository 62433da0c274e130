"""Work counted in lines of Python: the same number on every machine, whatever else runs there."""

import sys
from collections.abc import Callable
from types import FrameType


def lines_of(action: Callable[[], object], give_up: int) -> int:
    """Lines (and calls and returns) of Python that ``action`` executes.

    Args:
      action: what is counted.
      give_up: fails at this many, so that a hang ends.
    """
    count = 0

    def traced(frame: FrameType, event: str, arg: object):
        nonlocal count
        count += 1
        assert count < give_up, f"more than {give_up} lines of work"
        return traced

    before = sys.gettrace()
    sys.settrace(traced)
    try:
        action()
    finally:
        sys.settrace(before)
    return count
