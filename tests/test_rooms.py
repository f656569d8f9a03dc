"""The rooms of the package import one way, as docs/DESIGN.md lists it."""

import ast
import re
from pathlib import Path

from minis import ROOT

PACKAGE = ROOT / "eco_m2f"


def documented_rooms() -> dict[str, set[str]]:
    """{room: the rooms that it may import}, from the table of docs/DESIGN.md."""
    table = (ROOT / "docs/DESIGN.md").read_text().split("## Rooms")[1].split("## Words")[0]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines() if line[:3] == "| `"]
    rooms = {}
    for names, _, imports in rows:
        for name in re.findall(r"`(\w+)[./]", names):
            rooms[name] = set(re.findall(r"\w+", imports))
    return rooms


def imports_of(path: Path) -> set[str]:
    """The rooms that a file imports, including its own. Imports inside functions count too."""
    package = ["eco_m2f", *path.relative_to(PACKAGE).parent.parts]
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.level or str(node.module).startswith("eco_m2f")):
            base = package[: len(package) - node.level + 1] if node.level else []
            parts = [*base, *(node.module.split(".") if node.module else ())][1:]
            found |= {parts[0]} if parts else {alias.name for alias in node.names}
        elif isinstance(node, ast.Import):
            found |= {alias.name.split(".")[1] for alias in node.names if alias.name.startswith("eco_m2f.")}
    return found - {"__version__"}


def actual_rooms() -> dict[str, set[str]]:
    rooms: dict[str, set[str]] = {}
    for path in PACKAGE.rglob("*.py"):
        name = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
        if name != "__init__":
            rooms.setdefault(name, set()).update(imports_of(path) - {name})
    return rooms


def test_rooms_import_what_the_design_lists():
    assert actual_rooms() == documented_rooms()


def test_no_arrow_leads_back():
    """The rooms have an order in which each imports only earlier ones."""
    rooms, placed = actual_rooms(), set()
    while ready := {name for name in rooms if name not in placed and rooms[name] <= placed}:
        placed |= ready
    assert placed == set(rooms)
