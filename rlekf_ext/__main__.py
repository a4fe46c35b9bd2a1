"""`python -m rlekf_ext` is `rlekf`."""

import sys

from rlekf_ext.cli import main

sys.exit(main())
