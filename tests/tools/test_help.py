"""Every tool has the same shape: --help explains it, and `run` calls its main function."""

import ast
import re
import runpy
import sys

import pytest
from minis import ROOT

SHARED = {"timing.py"}  # no tool: what the benchmarks share
TOOLS = sorted(p for p in (ROOT / "tools").rglob("*.py") if p.name not in SHARED)
TOOLS += sorted((ROOT / "datasets").glob("*.py"))
BEFORE_INSTALLATION = {"setup_env", "install_detectron2"}  # there is no eco_m2f yet whose `run` they could call


def first_line(path) -> str:
    """The first line of the docstring."""
    return ast.get_docstring(ast.parse(path.read_text())).splitlines()[0]


@pytest.mark.parametrize("path", TOOLS, ids=lambda path: path.stem)
def test_help_explains(path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [str(path), "--help"])
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(path), run_name="__main__")
    assert end.value.code in (0, None)
    printed = capsys.readouterr().out
    assert "usage:" in printed
    assert first_line(path)[:40] in " ".join(printed.split()), "the help does not begin with what the tool does"


@pytest.mark.parametrize("path", TOOLS, ids=lambda path: path.stem)
def test_first_line_is_one_sentence_with_a_verb(path):
    assert re.fullmatch(r"[A-Z][a-z]+s .*[^.]\.", first_line(path)), first_line(path)


@pytest.mark.parametrize("path", [p for p in TOOLS if p.stem not in BEFORE_INSTALLATION], ids=lambda path: path.stem)
def test_tools_have_one_shape(path):
    """`build_parser()`, `main(args)`, and both handed to `run` in the last two lines."""
    text = path.read_text()
    functions = {n.name: [a.arg for a in n.args.args] for n in ast.parse(text).body if isinstance(n, ast.FunctionDef)}
    assert functions["build_parser"] == [] and functions["main"] == ["args"]
    last = r'\nif __name__ == "__main__":\n    sys\.exit\(run\((launch, )?main, build_parser\(\)\.parse_args\(\)\)\)\n'
    assert re.search(last + r"\Z", text), "the last lines are not those of every other tool"
    assert "    main()" not in text and text.startswith('"""')
