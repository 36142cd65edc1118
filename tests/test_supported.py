"""docs/supported.md's table of what starts on what: every cell is run against what is written."""

from __future__ import annotations

import pytest

from supported import FAMILIES, ROWS, outcome, table, written


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("row", ROWS)
def test_a_cell_is_what_comes_of_it(row, family):
    pytest.importorskip(ROWS[row].needs)
    assert outcome(row, family) == written()[row, family]


def test_the_table_has_no_other_cells():
    cells = written()
    assert list(cells) == [(row, family) for row in ROWS for family in FAMILIES]
    assert "yes" in cells.values() and table(cells).count("no (") == sum(text != "yes" for text in cells.values())
