"""Check the documents: every relative link leads somewhere, every `scion` command in a code block is one that exists.

python tools/check_docs.py
"""

import re
import shlex
import sys
from pathlib import Path
from typing import Any

import typer

from scionlm.cli.commands import app

ROOT = Path(__file__).parents[1]
LINK = re.compile(r"!?\[[^\]]*\]\((?!https?:|#)([^)#\s]+)")
BLOCK = re.compile(r"^```[a-z]*\n(.*?)^```", re.M | re.S)


def broken_links(path: Path) -> list[str]:
    """Return the relative links of a document that lead nowhere."""
    return [link for link in LINK.findall(path.read_text(encoding="utf-8")) if not (path.parent / link).exists()]


def wrong_commands(path: Path) -> list[str]:
    """Return the lines of a document's code blocks that call `scion` with a command or a flag it does not have."""
    root: Any = typer.main.get_command(app)
    wrong: list[str] = []
    for block in BLOCK.findall(path.read_text(encoding="utf-8")):
        for line in block.splitlines():
            if not line.startswith("scion "):
                continue
            words = shlex.split(line, comments=True)[1:]
            command = root.commands.get(words[0])
            known = {flag for option in command.params for flag in option.opts} if command else set()
            flags = {word for word in words[1:] if re.match(r"--?[a-z]", word)}
            if command is None or flags - known:
                wrong.append(line)
    return wrong


def main() -> int:
    """Check every document and return the exit code."""
    faults = [
        f"{path.relative_to(ROOT)}: {fault}"
        for path in sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")])
        for fault in broken_links(path) + wrong_commands(path)
    ]
    for fault in faults:
        print(fault, file=sys.stderr)
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
