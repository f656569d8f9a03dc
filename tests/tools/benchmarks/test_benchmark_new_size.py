"""tools/benchmarks/new_size.py runs sizes that are new. No time is asserted."""

import new_size
import pytest
from benched import rows_of
from tiny import Tiny

pytestmark = pytest.mark.slow


def test_every_round_has_a_size_of_its_own(tmp_path, monkeypatch):
    seen, run = [], new_size.first_and_later
    monkeypatch.setattr(new_size, "first_and_later", lambda model, *a: seen.append(a[:2]) or run(model, *a))
    (row,) = rows_of(
        new_size, tmp_path / "n.csv", "--config-file", Tiny(tmp_path).config(), "--size", 64, 96, "--rounds", 2
    )
    assert seen == [(64, 64), (64, 96), (64, 128)]
    assert all(float(row[name]) > 0 for name in ("first_ms", "later_ms", "ratio"))
