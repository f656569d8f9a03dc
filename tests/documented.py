"""The documented commands: those of every page, and of the first comment of every YAML in configs/."""

import re
import shlex
from dataclasses import dataclass
from pathlib import Path

from minis import CONFIGS, ROOT

PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "datasets").glob("*.md")])
STARTERS = ("python", "pip", "make", "torchrun", "srun")
SCRIPT = re.compile(r"(tools|datasets)/(\w+/)*\w+\.py$")


@dataclass(frozen=True)
class Command:
    """A command as a reader would type it, without `python` before a script of the project, and its place."""

    text: str
    page: str
    section: str = ""

    @property
    def words(self) -> list[str]:
        """The script and its arguments, without the launcher for several machines."""
        words = shlex.split(self.text)
        start = next((i for i, word in enumerate(words) if SCRIPT.match(word)), 0)
        return words[start:]

    @property
    def tool(self) -> str:
        """The stem of the script, or the name of the program."""
        return Path(self.words[0]).stem if SCRIPT.match(self.words[0]) else self.words[0]

    @property
    def folder(self) -> str:
        """The name of its working folder: one per section, and one for all configs."""
        page = "configs" if self.page.startswith("configs/") else self.page.replace("/", "_")
        return f"{page} {self.section}".strip().replace(":", "")

    @property
    def config(self) -> str | None:
        """The path of its config below configs/."""
        names = [b for a, b in zip(self.words, self.words[1:]) if a == "--config-file"]
        return names[0].removeprefix("configs/") if names else None


def all_commands() -> list[Command]:
    """All commands: those of configs/ first, then page by page."""
    found = [c for path in sorted(CONFIGS.rglob("*.yaml")) for c in of_yaml(path)]
    return found + [c for page in PAGES for c in of_page(page)]


def of_yaml(path: Path) -> list[Command]:
    """The commands of the first comment. Each has its own line, and may have a remark in parentheses after it."""
    comment = re.match(r"(#.*\n)*", path.read_text())[0]
    lines = [re.sub(r"\s{3,}\(.*\)$", "", line.removeprefix("#").strip()) for line in comment.splitlines()]
    return list(_commands(lines, str(path.relative_to(ROOT)), ""))


def of_page(path: Path) -> list[Command]:
    """The commands of code blocks, with continued lines joined, and those in lines of text."""
    found, page = [], str(path.relative_to(ROOT))
    for section in re.split(r"^(?=## )", path.read_text(), flags=re.MULTILINE):
        title = section.splitlines()[0].removeprefix("## ") if section.startswith("## ") else ""
        blocks = re.findall(r"^```(?:bash|sh)?\n(.*?)^```", section, re.MULTILINE | re.DOTALL)
        lines = [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]
        lines += re.findall(r"^    (\S.*)$", re.sub(r"^```.*?^```", "", section, flags=re.MULTILINE | re.DOTALL), re.M)
        text = re.sub(r"^```.*?^```", "", section, flags=re.MULTILINE | re.DOTALL)
        lines += [part for span in re.findall(r"`([^`\n]+)`", text) for part in span.split(" && ")]
        found += _commands([re.sub(r"\s+#\s.*$", "", line.strip()) for line in lines], page, title)
    return found


def _commands(lines: list[str], page: str, section: str):
    for line in lines:
        words = line.split()
        if len(words) < 2 or not (words[0] in STARTERS or SCRIPT.match(words[0])):
            continue  # a script's bare name is no command
        is_script = words[0] == "python" and SCRIPT.match(words[1])
        yield Command(" ".join(words[1:] if is_script else words), page, section)


def strays() -> list[str]:
    """Lines of first comments with a script and arguments that do not start with it, so that no test runs them."""
    inside = re.compile(r"^#.*\S.* (tools|datasets)/(\w+/)*\w+\.py \w")
    lines = [(path, line) for path in sorted(CONFIGS.rglob("*.yaml")) for line in path.read_text().splitlines()]
    return [f"{path.name}: {line}" for path, line in lines if line.startswith("#") and inside.match(line)]
