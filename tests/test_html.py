"""The site that `make html` writes: links, pictures, formulas, search; and no network."""

import base64
import importlib.util
import json
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote

import nbformat
import pytest
from lab import chromium, needs_browser, wait
from selenium.webdriver.common.by import By

for name in ("sphinx", "myst_nb", "furo"):
    pytest.importorskip(name, reason=f"{name} is not installed: make setup")
ROOT = Path(__file__).parent.parent
CHAPTERS = [path.stem for path in sorted(ROOT.glob("notebooks/*.ipynb"))]
SPEC = importlib.util.spec_from_file_location("course", ROOT / ".ci" / "course.py")
course = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(course)


class Page(HTMLParser):
    """What a page consists of: tags with their attributes, and the names that links can aim at."""

    def __init__(self, path):
        super().__init__()
        self.path, self.tags, self.text = path, [], path.read_text(encoding="utf-8")
        self.feed(self.text)
        self.names = {attrs["id"] for _, attrs in self.tags if "id" in attrs}

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def all(self, *tags):
        return [attrs for tag, attrs in self.tags if tag in tags]

    def article(self):
        """The part that its source says, without navigation."""
        return re.search(r'<article role="main".*?</article>', self.text, re.S)[0]


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The pages that `make html` makes: for Sphinx each warning, as of a link, is an error."""
    read, target = (tmp_path_factory.mktemp(name) for name in ("read", "site"))
    command = [sys.executable, "-m", "sphinx", "-q", "-W", "--keep-going", "-c", ".ci"]
    done = subprocess.run([*command, "-d", read, ".", target], cwd=ROOT, capture_output=True)
    assert done.returncode == 0, done.stderr.decode()
    paths = target.rglob("*.html")
    return {path.relative_to(target).as_posix(): Page(path) for path in paths}


def test_every_chapter_and_every_module_has_a_page(site):
    chapters = [f"notebooks/{name}" for name in CHAPTERS]
    modules = [f"utils/{path.stem}" for path in ROOT.glob("utils/[a-z]*.py")]
    tools = [f"data/{path.stem}" for path in ROOT.glob("data/*.py")]
    tools += [f"tests/{path.stem}" for path in ROOT.glob("tests/bench*.py")]
    pages = [p for pattern in course.PAGES for p in ROOT.glob(pattern) if p.suffix == ".md"]
    pages = [path.relative_to(ROOT).with_suffix("").as_posix() for path in pages]
    names = [*chapters, *modules, *tools, *pages, "index", "search"]
    assert set(site) == {f"{name}.html" for name in names}


def test_links_lead_somewhere(site):
    folder = site["index.html"].path.parent
    for name, page in site.items():
        for link in page.all("a", "link"):
            path, _, anchor = link["href"].partition("#")
            path = path.partition("?")[0]  # of styles: their version
            if path.startswith("http"):
                continue
            target = (page.path.parent / unquote(path)).resolve() if path else page.path
            assert target.is_file(), f"{name}: {link['href']} leads nowhere"
            if anchor:
                there = site[target.relative_to(folder).as_posix()].names
                assert unquote(anchor) in there, f"{name}: no place {anchor} in {target.name}"


def test_nothing_is_loaded_from_the_network(site):
    folder = site["index.html"].path.parent
    for name, page in site.items():
        assert not page.all("iframe"), name
        loaded = page.all("img", "audio", "source", "video", "script")
        sources = [tag["src"] for tag in loaded if "src" in tag]
        sources += [tag["href"] for tag in page.all("link") if tag["href"] != "#"]
        for source in sources:
            place = page.path.parent / unquote(source.partition("?")[0])
            local = source.startswith("data:") or place.is_file()
            assert local, f"{name}: {source[:80]} is not at hand"
    for style in folder.rglob("*.css"):
        text = style.read_text(encoding="utf-8")
        assert not re.search(r"url\(['\"]?(https?:)?//|@import", text), style


def test_light_and_dark(site):
    folder = site["index.html"].path.parent
    for name, page in site.items():
        buttons = [tag for tag in page.all("button") if "theme-toggle" in tag.get("class", "")]
        assert buttons, f"{name}: nothing switches between light and dark"
    for style in ("pygments", "site"):
        text = (folder / "_static" / f"{style}.css").read_text(encoding="utf-8")
        assert 'data-theme="dark"' in text and "prefers-color-scheme: dark" in text


def test_every_picture_is_described(site):
    for name, page in site.items():
        alts = [image["alt"] for image in page.all("img")]
        assert all(len(alt) >= 20 for alt in alts), f"{name}: {alts}"
        words = " ".join(alts)
        assert not re.search(r"[`$\\]|\]\(", words), f"{name}: markdown in an alternative text"


@pytest.mark.parametrize("chapter", CHAPTERS)
def test_all_of_a_chapter_is_there(site, chapter):
    book = nbformat.read(ROOT / "notebooks" / f"{chapter}.ipynb", as_version=4)
    page = site[f"notebooks/{chapter}.html"]
    code = [cell for cell in book.cells if cell.cell_type == "code"]
    outputs = [output for cell in code for output in cell.outputs]
    pictures = [output for output in outputs if "image/png" in output.get("data", {})]
    assert len(page.all("img")) >= len(pictures)
    assert len(re.findall(r'<div class="cell_input', page.text)) == len(code) - 1  # no set-up
    prose = "\n".join(cell.source for cell in book.cells if cell.cell_type == "markdown")
    assert len(page.all("details")) >= prose.count("<details")
    prose = re.sub(r"```.*?```|`[^`]*`", "", prose, flags=re.S)
    formulas = re.findall(r"\$\$.+?\$\$|\$[^$]+\$", prose, flags=re.S)
    shown = re.findall(r"<math.*?</math>", page.article(), flags=re.S)
    assert len(shown) == len(formulas)
    for formula in shown:
        assert "\\" not in formula and "&</m" not in formula, f"TeX that was not read: {formula}"


def test_one_can_walk_from_the_first_chapter_to_the_last_and_back(site):
    for i, chapter in enumerate(CHAPTERS):
        links = site[f"notebooks/{chapter}.html"].all("link")
        steps = {link["rel"]: link["href"] for link in links if link["rel"] in ("prev", "next")}
        if i:
            assert steps["prev"] == f"{CHAPTERS[i - 1]}.html"
        if chapter != CHAPTERS[-1]:
            assert steps["next"] == f"{CHAPTERS[i + 1]}.html"
    for name, page in site.items():
        tree = re.search(r'<div class="sidebar-tree">.*?</div>', page.text, re.S)[0]
        links = re.findall(r'href="([^"]*)">(\d\d\w? · )', tree)
        assert len(links) == len(CHAPTERS), name
        if name.removeprefix("notebooks/").removesuffix(".html") in CHAPTERS:
            assert tree.count('aria-current="page"') + tree.count("current-page") == 1, name


def test_the_search_knows_the_chapters(site):
    index = (site["index.html"].path.parent / "searchindex.js").read_text(encoding="utf-8")
    found = json.loads(re.fullmatch(r"Search.setIndex\((.*)\)\s*", index, re.S)[1])
    assert len(found["docnames"]) == len(site) - 2  # the front page is there twice; the search
    assert found["docnames"][found["terms"]["nyquist"]] == "notebooks/01_mel_spectrograms"


@needs_browser
def test_the_search_works_on_a_disk(site):
    """Without a server: what you find after `make html`, when you open the page."""
    with chromium() as driver:
        driver.get(f"{site['search.html'].path.as_uri()}?q=leakage")
        found = "#search-results li a"
        links = wait(driver, lambda d: d.find_elements(By.CSS_SELECTOR, found), "the results")
        assert "Log-mel spectrograms" in " ".join(link.text for link in links)
        driver.get(links[0].get_attribute("href"))
        assert "leakage" in driver.find_element(By.TAG_NAME, "article").text


def test_pictures_without_prose_behind_them_take_the_prose_before():
    cells = [
        nbformat.v4.new_markdown_cell("## Title\n\nFirst. **Now** the [picture](x.ipynb) of $x$:"),
        nbformat.v4.new_code_cell("plt.show()"),
        nbformat.v4.new_markdown_cell("## Another section\n\nNot about it."),
    ]
    assert course.alternative(cells, 1) == "First. Now the picture of x:"
    cells.insert(2, nbformat.v4.new_markdown_cell("It rises."))
    assert course.alternative(cells, 1) == "It rises."


def test_the_journey_in_the_readme_is_the_one_of_chapter_00():
    book = nbformat.read(ROOT / "notebooks" / "00_overview.ipynb", as_version=4)
    outputs = [o for cell in book.cells if cell.cell_type == "code" for o in cell.outputs]
    pictures = [o["data"]["image/png"] for o in outputs if "image/png" in o.get("data", {})]
    journey = (ROOT / "img" / "journey.png").read_bytes()
    assert journey in map(base64.b64decode, pictures), "run .ci/journey.py"
    assert "(img/journey.png)" in (ROOT / "README.md").read_text("utf-8")


def test_make_knows_the_site():
    assert "sphinx -q -W --keep-going -c .ci" in (ROOT / "Makefile").read_text("utf-8")
    assert "_site/" in (ROOT / ".gitignore").read_text("utf-8").split()
