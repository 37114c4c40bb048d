"""Breaks what ``WOOLMILL_MUTANT`` names, in a process that a broken one starts."""

import os

from tests.crash import mutants

mutants.apply(os.environ["WOOLMILL_MUTANT"])
