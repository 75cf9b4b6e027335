"""The site that `make html` writes: links, alternative texts, formulas, navigation; no network."""

import base64
import importlib.util
import re
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote

import nbformat
import pytest

pytest.importorskip("latex2mathml", reason="latex2mathml is not installed: make setup")
ROOT = Path(__file__).parent.parent
CHAPTERS = [path.stem for path in sorted(ROOT.glob("notebooks/*.ipynb"))]
SPEC = importlib.util.spec_from_file_location("pages", ROOT / ".ci" / "pages.py")
pages = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(pages)


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


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    folder = tmp_path_factory.mktemp("site")
    pages.main(folder)
    return {path.relative_to(folder).as_posix(): Page(path) for path in folder.rglob("*.html")}


def test_every_chapter_and_every_module_has_a_page(site):
    modules = [path.stem for path in ROOT.glob("utils/[a-z]*.py")]
    expected = {f"{name}.html" for name in [*CHAPTERS, "index", "data"]}
    assert set(site) == expected | {f"utils/{name}.html" for name in modules}


def test_links_lead_somewhere(site):
    folder = site["index.html"].path.parent
    for name, page in site.items():
        for link in page.all("a", "link"):
            path, _, anchor = link["href"].partition("#")
            if path.startswith("http"):
                continue
            target = (page.path.parent / path).resolve() if path else page.path
            assert target.is_file(), f"{name}: {link['href']} leads nowhere"
            assert target.suffix in (".html", ".css"), f"{name}: {link['href']} is no page"
            if anchor:
                there = site[target.relative_to(folder).as_posix()].names
                assert unquote(anchor) in there, f"{name}: no place {anchor} in {target.name}"


def test_nothing_is_loaded_from_the_network(site):
    for name, page in site.items():
        assert not page.all("script", "iframe"), name
        loaded = page.all("img", "audio", "source", "video")
        sources = [tag["src"] for tag in loaded if "src" in tag]
        sources += [tag["href"] for tag in page.all("link")]
        for source in sources:
            local = source.startswith("data:") or (page.path.parent / source).is_file()
            assert local, f"{name}: {source[:80]} is not at hand"
    style = (site["index.html"].path.parent / "style.css").read_text(encoding="utf-8")
    assert "url(" not in style and "@import" not in style
    assert "prefers-color-scheme: dark" in style


def test_every_picture_is_described(site):
    for name, page in site.items():
        alts = [image["alt"] for image in page.all("img")]
        assert all(len(alt) >= 20 for alt in alts), f"{name}: {alts}"
        words = " ".join(alts)
        assert not re.search(r"[`$\\]|\]\(", words), f"{name}: markdown in an alternative text"


@pytest.mark.parametrize("chapter", CHAPTERS)
def test_all_of_a_chapter_is_there(site, chapter):
    book = nbformat.read(ROOT / "notebooks" / f"{chapter}.ipynb", as_version=4)
    page = site[f"{chapter}.html"]
    pictures = [
        output for cell in book.cells if cell.cell_type == "code" for output in cell.outputs
        if "image/png" in output.get("data", {})
    ]  # fmt: skip
    assert len(page.all("img")) >= len(pictures)
    prose = "\n".join(cell.source for cell in book.cells if cell.cell_type == "markdown")
    prose = re.sub(r"```.*?```|`[^`]*`", "", prose, flags=re.S)
    formulas = re.findall(r"\$\$.+?\$\$|\$[^$]+\$", prose, flags=re.S)
    shown = re.findall(r"<math.*?</math>", page.text, flags=re.S)
    assert len(shown) == len(formulas)
    for formula in shown:
        assert "\\" not in formula and "&</m" not in formula, f"TeX that was not read: {formula}"


def test_one_can_walk_from_the_first_chapter_to_the_last_and_back(site):
    for i, chapter in enumerate(CHAPTERS):
        page = site[f"{chapter}.html"]
        steps = {link["rel"]: link["href"] for link in page.all("a") if "rel" in link}
        near = {"prev": CHAPTERS[i - 1 : i] if i else [], "next": CHAPTERS[i + 1 : i + 2]}
        assert steps == {rel: f"{found[0]}.html" for rel, found in near.items() if found}
    for name, page in site.items():
        root = "../" * name.count("/")
        links = [link["href"] for link in page.all("a")]
        assert links[-len(CHAPTERS) :] == [f"{root}{chapter}.html" for chapter in CHAPTERS], name
        here = [link["href"] for link in page.all("a") if "aria-current" in link]
        assert here == ([name] if name.removesuffix(".html") in CHAPTERS else [])


def test_a_broken_link_is_an_error_with_its_name(tmp_path):
    source = ROOT / "README.md"
    renderer = pages.Prose(source, pages.all_pages(), tmp_path)
    with pytest.raises(ValueError, match=r"README.md: the link notebooks/77.ipynb leads nowhere"):
        renderer.convert("[gone](notebooks/77.ipynb)")
    assert 'href="14_evaluation.html#x"' in renderer.convert("[a](notebooks/14_evaluation.ipynb#x)")
    assert "/blob/main/LICENSE" in renderer.convert("[a](LICENSE)")
    assert "/tree/main/img" in renderer.convert("[a](img)")


def test_pictures_without_prose_behind_them_take_the_prose_before():
    cells = [
        nbformat.v4.new_markdown_cell("## Title\n\nFirst. **Now** the [picture](x.ipynb) of $x$:"),
        nbformat.v4.new_code_cell("plt.show()"),
        nbformat.v4.new_markdown_cell("## Another section\n\nNot about it."),
    ]
    assert pages.alternative(cells, 1) == "First. Now the picture of x:"
    cells.insert(2, nbformat.v4.new_markdown_cell("It rises."))
    assert pages.alternative(cells, 1) == "It rises."


def test_the_journey_in_the_readme_is_the_one_of_chapter_00():
    book = nbformat.read(ROOT / "notebooks" / "00_overview.ipynb", as_version=4)
    outputs = [o for cell in book.cells if cell.cell_type == "code" for o in cell.outputs]
    pictures = [o["data"]["image/png"] for o in outputs if "image/png" in o.get("data", {})]
    journey = (ROOT / "img" / "journey.png").read_bytes()
    assert journey in map(base64.b64decode, pictures), "run .ci/journey.py"
    assert "(img/journey.png)" in (ROOT / "README.md").read_text("utf-8")


def test_make_knows_the_site():
    assert ".ci/pages.py" in (ROOT / "Makefile").read_text("utf-8")
    assert "_site/" in (ROOT / ".gitignore").read_text("utf-8").split()
