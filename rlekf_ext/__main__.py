"""`python -m rlekf_ext` runs the command `rlekf`."""

import sys

from rlekf_ext.cli import main

sys.exit(main())
