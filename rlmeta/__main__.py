"""`python -m rlmeta`: the command line."""

import sys

from rlmeta.cli import main

sys.exit(main())
