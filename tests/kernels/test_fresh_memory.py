"""The fixture that fills fresh memory (conftest.py): seen by every kernel test, left behind in none of the process's others."""

import torch
from torch.utils._device import _device_constructors


def test_fresh_memory_shows_what_was_not_written() -> None:
    assert torch.empty(3).isnan().all()
    assert (torch.empty(3, dtype=torch.int32) == 2**31 - 1).all()
    assert torch.empty(3, dtype=torch.bool).all()


def test_torch_remembers_its_own_constructor() -> None:
    """Else a later `with torch.device("meta")`, in any test of this process, would allocate on the CPU."""
    assert torch.empty not in _device_constructors()  # the one that fills
    with torch.device("meta"):
        assert torch.empty(3).device.type == "meta"
