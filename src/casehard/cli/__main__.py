"""Allow ``python -m casehard.cli``."""

from casehard.cli import script

script()
