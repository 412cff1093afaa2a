"""`python -m rlmeta`: the command line. `rlmeta/__init__.py` has dropped the current folder from `sys.path` before."""

import sys

from rlmeta.cli.main import main

sys.exit(main())
