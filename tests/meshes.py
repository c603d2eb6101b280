"""The meshes that are compared with one device."""

import pytest

# Plain data parallelism asks for less than the other does: it is among the slow proofs.
MESHES = [pytest.param({"data": 4}, marks=pytest.mark.slow), {"data": 1, "fsdp": 2, "tensor": 2}]
