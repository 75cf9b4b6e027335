"""Stamp the repository's address everywhere: `make badges REPO=owner/name`.

The address lives in one place, `[project.urls] Repository` in pyproject.toml; notebooks, README
and workflows repeat it in badges and links, and this script replaces the old one there.
"""

import re
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).parent.parent
STAMPED = ["pyproject.toml", "README.md", "notebooks/*.ipynb", "*/*.md"]


def main(words):
    if len(words) != 1 or not re.fullmatch(r"[\w.-]+/[\w.-]+", words[0]):
        print("give the repository as owner/name: make badges REPO=owner/name", file=sys.stderr)
        return 2
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    old = "/".join(project["urls"]["Repository"].split("/")[-2:])
    for path in sorted(path for pattern in STAMPED for path in ROOT.glob(pattern)):
        text = path.read_text(encoding="utf-8")
        if old in text:
            path.write_text(text.replace(old, words[0]), encoding="utf-8")
            print(f"{path.relative_to(ROOT)}: {text.count(old)}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
