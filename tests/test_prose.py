"""What people read: links lead somewhere, and words are spelt as in British English."""

import ast
import io
import json
import re
import subprocess
import sys
import tokenize
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

ROOT = Path(__file__).parent.parent
WHERE = ("*.md", ".github/*.md", "[dnu]*/*.md", "notebooks/*.ipynb")
PAGES = [path for pattern in WHERE for path in sorted(ROOT.glob(pattern))]
FOLDERS = ("utils", "tests", "data", ".ci")
PROGRAMS = [path for folder in FOLDERS for path in sorted((ROOT / folder).glob("[!_]*.py"))]


def markdown(path):
    """The Markdown of a page: a file, or the cells of a notebook."""
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".md":
        return text
    cells = [cell for cell in json.loads(text)["cells"] if cell["cell_type"] == "markdown"]
    return "\n\n".join("".join(cell["source"]) for cell in cells)


def without_code(text):
    return re.sub(r"^ *```.*?^ *```|`[^`\n]*`", "", text, flags=re.M | re.S)


def links(text):
    """The addresses of links and pictures, also of those around a picture."""
    return re.findall(r"\]\(([^)\s]+)\)|<(https?://[^>\s]+)>", without_code(text))


def anchors(path):
    """The names of a page's headings: JupyterLab's in notebooks, elsewhere GitHub's."""
    text = re.sub(r"^ *```.*?^ *```", "", markdown(path), flags=re.M | re.S)
    heads = [head.strip().replace("`", "") for head in re.findall(r"^#+ (.+)$", text, re.M)]
    if path.suffix == ".md":
        heads = [re.sub(r"[^\w -]", "", head.lower()) for head in heads]
    return {head.replace(" ", "-") for head in heads}


LINKS = {path: [a or b for a, b in links(markdown(path))] for path in PAGES}


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_links_lead_somewhere(path):
    for link in LINKS[path]:
        place, _, anchor = link.partition("#")
        if urlsplit(link).scheme:
            continue
        target = (path.parent / unquote(place)).resolve() if place else path
        assert target.exists() and target.is_relative_to(ROOT), f"{link}: there is no such file"
        if anchor:
            assert unquote(anchor) in anchors(target), f"{link}: no heading of this name"


def test_addresses_are_well_formed():
    """Whether they answer is looked up once a week: .github/workflows/ci.yml."""
    for path, found in LINKS.items():
        for link in filter(lambda link: urlsplit(link).scheme, found):
            parts = urlsplit(link)
            host = re.fullmatch(r"([a-z0-9-]+\.)+[a-z]{2,}", parts.netloc)
            assert parts.scheme == "https" and host, f"{path.name}: {link} is no address"
            assert not re.search(r"[.,;:]$|example\.", link), f"{path.name}: {link} ends oddly"


# -- spelling -----------------------------------------------------------------------------------


def prose(path):
    """What a page or program says in English: no code, formulas, addresses, tags, italics.

    Words in italics may be quoted: "*great* for *gray*".
    """
    if path.suffix != ".py":
        text = markdown(path)
    else:
        source = path.read_text(encoding="utf-8")
        tokens = tokenize.generate_tokens(io.StringIO(source).readline)
        comments = [token.string for token in tokens if token.type == tokenize.COMMENT]
        kinds = ast.Module | ast.ClassDef | ast.FunctionDef
        nodes = [node for node in ast.walk(ast.parse(source)) if isinstance(node, kinds)]
        text = "\n".join([*comments, *filter(None, map(ast.get_docstring, nodes))])
    other = r"\$\$.*?\$\$|\$[^$\n]+\$|\]\([^)]*\)|https?://\S+|</?\w+[^>]*>"
    other += r"|(?<![*\w])\*[^*\n]+\*(?!\*)"
    return re.sub(other, " ", without_code(text), flags=re.S)


@pytest.fixture(scope="module")
def english(tmp_path_factory):
    """A folder with the prose of every page and program."""
    folder = tmp_path_factory.mktemp("prose")
    for path in [*PAGES, *PROGRAMS]:
        name = path.relative_to(ROOT).as_posix().replace("/", ":")
        (folder / f"{name}.txt").write_text(prose(path), encoding="utf-8")
    return folder


def misspelt(folder, *options):
    command = [sys.executable, "-m", "codespell_lib", *options, "."]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, encoding="utf-8")
    assert done.returncode in (0, 65), done.stderr
    return done.stdout


def test_no_word_is_misspelt(english):
    pytest.importorskip("codespell_lib", reason="codespell is not installed: make setup")
    assert not misspelt(english)


def test_words_are_spelt_as_in_british_english(english, tmp_path):
    """codespell knows which British words Americans spell otherwise: its list, turned round."""
    library = pytest.importorskip("codespell_lib", reason="codespell is not installed: make setup")
    american = Path(library.__file__).parent / "data" / "dictionary_en-GB_to_en-US.txt"
    pairs = [line.split("->") for line in american.read_text(encoding="utf-8").splitlines()]
    words = tmp_path / "british.txt"
    words.write_text("\n".join(f"{us.strip()}->{gb}" for gb, us in pairs), encoding="utf-8")
    right = "program,programs,practice,license"  # of computers; the noun; the file
    assert not misspelt(english, "-D", str(words), "-L", right)
