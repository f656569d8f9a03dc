"""MODEL_ZOO.md has every row of the paper's tables, and the links of all pages exist."""

import csv
import re

import pytest
from minis import ROOT

ZOO = (ROOT / "MODEL_ZOO.md").read_text()
ROWS = [[cell.strip() for cell in line.strip("|").split("|")] for line in ZOO.splitlines() if line.startswith("|")]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "datasets").glob("*.md")])


def numbers(cells) -> set[float]:
    return {float(n) for cell in cells for n in re.findall(r"(?<![\w.])-?\d+(?:\.\d+)?(?![\w.])", cell)}


def test_every_row_of_the_papers_tables_is_there(shared):
    """A row of the zoo has all numbers of the paper's row, also those of layers and budgets."""
    found, checked = [numbers(row) for row in ROWS], 0
    for line in csv.reader((shared / "reference" / "paper_tables.csv").open()):
        if not line or line[0] in ("table", "table5", "table7", "proscale"):
            continue
        first, last = {"5": (3, None), "7": (3, -1)}.get(line[0], (5, -1))  # the last column is this project's remark
        values = line[first:last]
        wanted = {float(v) for v in values if re.fullmatch(r"[\d.]+", v.strip())}
        if wanted:
            checked += 1
            assert any(wanted <= row for row in found), line
    assert checked > 60


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    targets = re.findall(r"\]\((?!https?://)([^)#]+)\)", page.read_text())
    assert [t for t in targets if not (page.parent / t).exists()] == []
