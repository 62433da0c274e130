"""The proof that a backend is right on this file and this machine.

- ``contract.toml``: the clauses, each with a bound and the test that can falsify it
- ``verify``: runs them and writes a receipt
- ``gate``: a short check when a backend first meets a file
- ``judge``: every stage from its own inputs, which all of these rest on
- ``trace``: every stage of every layer for a prompt
- ``bisect``: the first stage that departs, and why
- ``experts``: which experts a text uses
"""

from qwen3_moe_jax.parity.contract import Clause, Contract, load_contract
from qwen3_moe_jax.parity.verify import Report, verify

__all__ = ["Clause", "Contract", "Report", "load_contract", "verify"]
