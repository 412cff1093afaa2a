"""`python -m rlmeta`: the command line."""

import sys

from rlmeta.cli.main import main

sys.exit(main())
