"""`python -m rsaft_fast`: the command line."""

import sys

from rsaft_fast.cli import main

sys.exit(main())
