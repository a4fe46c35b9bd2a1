"""The command `rlekf`, also as `python -m rlekf_ext`."""

import os
import sys


def main() -> int:
    """Run the command and return its exit code. OpenMP's threads sleep while they wait, unless OMP_WAIT_POLICY is set.

    By default they spin: beside another program on the same cores, an update then waits for whole time slices.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    from rlekf_ext.cli import main as command  # loads torch, whose OpenMP reads the variable at that moment

    return command()


if __name__ == "__main__":
    sys.exit(main())
