"""The CPU's own products: C for integer dot products, called by XLA through its foreign functions.

- ``csrc``: the C code; ``ffi.h`` alone knows XLA's calls.
- :mod:`forms`: instruction sets that it is written for, and which one this processor has.
- :mod:`compiler`: makes the library, once for each machine, and keeps it on disk.
- :mod:`library`: loads it, starts its threads, and says why it does not run where it does not.
- :mod:`operands`: packed matrices as arguments of a call.
"""
