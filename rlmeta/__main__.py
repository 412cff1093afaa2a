"""`python -m rlmeta`: the command line."""

import os
import sys

here = os.getcwd()
if not sys.flags.safe_path and sys.path[:1] == [here]:  # `-m` puts the current folder before everything installed
    del sys.path[0]
    if os.path.realpath(here) == os.path.realpath(os.path.join(os.path.dirname(__file__), os.pardir)):
        sys.path.append(here)  # rlmeta itself is here

from rlmeta.cli.main import main  # noqa: E402

sys.exit(main())
