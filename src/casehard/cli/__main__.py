"""Allow ``python -m casehard.cli``."""

import sys

from casehard.cli import main

sys.exit(main())
