"""Every tool says what it does."""

import ast
import runpy
import sys

import pytest
from minis import ROOT

TOOLS = sorted([*(ROOT / "tools").glob("*.py"), *(ROOT / "datasets").glob("prepare_*.py")])


@pytest.mark.parametrize("path", TOOLS, ids=lambda path: path.stem)
def test_help_explains(path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [str(path), "--help"])
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(path), run_name="__main__")
    assert end.value.code in (0, None)
    printed = capsys.readouterr().out
    assert "usage:" in printed
    summary = " ".join(ast.get_docstring(ast.parse(path.read_text())).splitlines()[0].split())
    assert summary[:40] in " ".join(printed.split()), "the help does not begin with what the tool does"
