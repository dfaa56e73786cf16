"""`python -m co2s_fast`, which `torchrun -m` needs."""

from __future__ import annotations

from co2s_fast.cli import main

if __name__ == "__main__":
    main()
