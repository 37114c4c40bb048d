"""Datasets of any everyday form in and out, told by their content and not by their names.

forms (what a file holds, and text of any encoding) ─▶ read (rows) ─▶ compared (what of a row)
                                       tables (Parquet and Arrow, in and out)
                                                            write (rows, in the form they had)
"""

from engine.datasets.bad_rows import (
    BAD_ROWS,
    BadRowError,
    BadRows,
    OnBadRow,
    Skip,
    count_bad_rows,
)
from engine.datasets.compared import Compared, choose
from engine.datasets.forms import Form, Row
from engine.datasets.read import Dataset, read_rows
from engine.datasets.write import inert, writer

__all__ = [
    "BAD_ROWS",
    "BadRowError",
    "BadRows",
    "Compared",
    "Dataset",
    "Form",
    "OnBadRow",
    "Row",
    "Skip",
    "choose",
    "count_bad_rows",
    "inert",
    "read_rows",
    "writer",
]
