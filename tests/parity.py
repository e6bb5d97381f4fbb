"""Our code against tensors of the authors' code: `python -m tests.parity FILE.npz …` (see `tests.helpers.parity`)."""

from __future__ import annotations

import sys

from tests.helpers.parity import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
