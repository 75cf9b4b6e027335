"""The course as a static site: `make html` writes _site/, which asks for no server and no network.

Notebooks are shown as they were run; nothing is executed. Formulas become MathML, pictures get
the sentence that reads them as alternative text, and links between chapters lead to pages.
"""

import html
import json
import re
import shutil
import sys
import tomllib
from functools import lru_cache
from pathlib import Path
from urllib.parse import unquote

import nbformat
from latex2mathml.converter import convert
from nbconvert.filters.markdown_mistune import IPythonRenderer, MarkdownWithMath
from pygments import highlight
from pygments.formatters import HtmlFormatter
from pygments.lexers import PythonLexer

ROOT = Path(__file__).resolve().parent.parent
WIDGET, STATE = (f"application/vnd.jupyter.widget-{kind}+json" for kind in ("view", "state"))
PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{title}</title>
<link rel="stylesheet" href="{root}style.css">
</head>
<body>
<header>
<a href="{root}index.html">Whisper from scratch</a> {steps} <a href="#chapters">Chapters</a>
</header>
<main>
{body}
</main>
<footer>{steps}</footer>
<nav id="chapters" aria-label="Chapters"><ol>
{chapters}
</ol></nav>
</body>
</html>
"""


def all_pages():
    """{file of the repository: its page}, chapters first and in order."""
    pages = {path: f"{path.stem}.html" for path in sorted(ROOT.glob("notebooks/*.ipynb"))}
    pages |= {ROOT / "README.md": "index.html", ROOT / "data" / "README.md": "data.html"}
    return pages | {path: f"utils/{path.stem}.html" for path in ROOT.glob("utils/[a-z]*.py")}


def repository():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    return project["urls"]["Repository"]


def formula(tex, display):
    """TeX -> MathML. A tag becomes the number beside the formula."""
    number = re.search(r"\\tag\{(\w+)\}", tex)
    tex = re.sub(r"\\tag\{\w+\}", "", tex).replace(r"\\[2pt]", r"\\").strip()
    tex = re.sub(r"\\arg(?![a-z])", r"\\operatorname{arg}", tex.replace("{aligned}", "{align}"))
    tex = re.sub(r"\\(ln|cos|sin|log(?:_\{?10\}?)?)(?=\s*[A-Za-z\\])", r"\\\1\\,", tex)
    if display == "inline":
        return convert(tex)
    beside = f'<span class="number">({number[1]})</span>' if number else ""
    return f'<div class="formula">{convert(tex, display="block")}{beside}</div>\n'


class Prose(IPythonRenderer):
    """Markdown of one file -> HTML, with formulas as MathML and links that lead to pages."""

    def __init__(self, source, pages, folder):
        super().__init__(escape=False)
        self.source, self.pages, self.folder = source, pages, folder
        self.root = "../" * pages[source].count("/")

    def block_math(self, body):
        return formula(body, "block")

    def inline_math(self, body):
        return formula(body, "inline")

    def heading(self, text, level, **attrs):
        name = re.sub(r"<[^>]+>", "", text).replace(" ", "-")
        return f'<h{level} id="{name}">{text}</h{level}>\n'

    def link(self, text, url, title=None):
        return f'<a href="{self.address(url)}">{text}</a>'

    def image(self, text, url, title=None):
        """A picture of the repository comes along; one of the web, a badge, becomes its words."""
        if url.startswith("http"):
            return text
        place = (self.source.parent / url).resolve().relative_to(ROOT)
        (self.folder / place).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / place, self.folder / place)
        return f'<img src="{self.root}{place.as_posix()}" alt="{html.escape(text)}">'

    def address(self, url):
        """Where a link of the file leads on the site. Raises `ValueError` if nowhere."""
        path, hash_sign, anchor = url.partition("#")
        if not path or re.match(r"\w+:", url):
            return url
        target = (self.source.parent / unquote(path)).resolve()
        if target in self.pages:
            return self.root + self.pages[target] + hash_sign + anchor
        if not target.exists():
            raise ValueError(f"{self.source.name}: the link {url} leads nowhere: correct it.")
        kind = "tree" if target.is_dir() else "blob"
        return f"{repository()}/{kind}/main/{target.relative_to(ROOT).as_posix()}"

    def convert(self, markdown):
        page = MarkdownWithMath(renderer=self).render(markdown)
        tight = r'<span class="tight">\1</span>'  # a comma stays with its formula
        return re.sub(r"(<math\b(?:(?!</math>).)*</math>[,.;:)]+)", tight, page)


def paragraphs(cell):
    """The paragraphs of prose in a cell, without headings, tables, formulas, HTML and code."""
    parts = cell.source.strip().split("\n\n") if cell.cell_type == "markdown" else []
    return [part for part in parts if not re.match(r"#|\||<|\$\$|```", part)]


def sentences(paragraph, longest=300):
    """Markdown as plain text: as many whole sentences as are short enough together."""
    words = re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", " ".join(paragraph.split()))
    words = re.sub(r"[*`$\\{}]", "", words)
    kept = ""
    for sentence in re.split(r"(?<=[.?!:])\s+", words):
        if kept and len(kept) + len(sentence) > longest:
            break
        kept = f"{kept} {sentence}".strip()
    return kept


def alternative(cells, i):
    """What a picture of cell i shows: the prose that reads it, or else that announces it."""
    near = [cell for cell in cells[i + 1 : i + 3] if not cell.source.startswith("#")]
    after = [part for cell in near for part in paragraphs(cell)]
    before = [part for cell in cells[:i] for part in paragraphs(cell)]
    return sentences(" ".join(after) or before[-1])


def picture(data, alt):
    data = "".join(data.split())
    return f'<img src="data:image/png;base64,{data}" alt="{html.escape(alt)}" loading="lazy">'


def parts(state, name):
    """A widget and all widgets in it."""
    yield (widget := state[name])
    for child in widget["state"].get("children", []):
        yield from parts(state, child.removeprefix("IPY_MODEL_"))


def widget_picture(state, name, alt):
    """The picture that a widget shows, and where its sliders stand; nothing for progress bars."""
    found = list(parts(state, name))
    images = [w["buffers"][0]["data"] for w in found if w["model_name"] == "ImageModel"]
    knobs = [w["state"] for w in found if w["state"].get("description") and "value" in w["state"]]
    if not images:
        return ""
    where = html.escape("; ".join(f"{knob['description']}: {knob['value']}" for knob in knobs))
    note = f"<figcaption>To be moved in JupyterLab or Colab. Here, {where}.</figcaption>"
    return f"<figure>{picture(images[0], alt)}{note}</figure>"


def output(out, alt, state):
    """One output of a cell -> HTML."""
    if out.output_type == "stream":
        return f"<pre>{html.escape(out.text)}</pre>"
    if WIDGET in out.data:
        return widget_picture(state, out.data[WIDGET]["model_id"], alt)
    if "image/png" in out.data:
        return f"<figure>{picture(out.data['image/png'], alt)}</figure>"
    if "text/html" in out.data:
        return f"<div>{out.data['text/html']}</div>"
    return f"<pre>{html.escape(out.data['text/plain'])}</pre>"


def code(source):
    return highlight(source, PythonLexer(), HtmlFormatter())


def notebook(path, renderer):
    """A notebook -> HTML. The set-up cell for Colab is left out: a page has nothing to set up."""
    book = nbformat.read(path, as_version=4)
    state = book.metadata.get("widgets", {}).get(STATE, {}).get("state", {})
    pieces, export = [], ""
    for i, cell in enumerate(book.cells):
        if cell.cell_type == "markdown":
            pieces.append(renderer.convert(cell.source))
        elif "google.colab" not in cell.source:
            for name in re.findall(r"#\| default_exp (\w+)", cell.source):
                export = f'<a class="export" href="utils/{name}.html">utils/{name}.py</a>'
            source = re.sub(r"^#\| .*\n", "", cell.source)
            link = export if cell.source.startswith("#| export") else ""
            pieces.append(f'<div class="cell">{link}{code(source)}</div>')
            shown = [output(out, alternative(book.cells, i), state) for out in cell.outputs]
            pieces += [f'<div class="output">{piece}</div>' for piece in shown if piece]
    return "\n".join(pieces)


def module(path, renderer):
    """A module of utils/ -> HTML, with a link to the chapter that wrote it, if one did."""
    source = path.read_text(encoding="utf-8")
    chapter = re.search(r"\.\./notebooks/(\w+)\.ipynb", source)
    words = "Plain Python, which no chapter develops."
    if chapter:
        words = f'Written by <a href="../{chapter[1]}.html">{chapter[1]}.ipynb</a>.'
    return f"<h1>utils/{path.name}</h1>\n<p>{words}</p>\n{code(source)}"


def text(path, renderer):
    return renderer.convert(path.read_text(encoding="utf-8"))


@lru_cache
def heading(path):
    """The first heading of a notebook."""
    first = json.loads(path.read_text(encoding="utf-8"))["cells"][0]["source"]
    return "".join(first).splitlines()[0].lstrip("# ")


def steps(path, chapters):
    """Links to the chapters before and after."""
    order = list(chapters)
    i, links = order.index(path), []
    if i > 0:
        before = order[i - 1]
        links.append(f'<a rel="prev" href="{chapters[before]}">← {heading(before)}</a>')
    if i + 1 < len(order):
        after = order[i + 1]
        links.append(f'<a rel="next" href="{chapters[after]}">{heading(after)} →</a>')
    return " ".join(links)


def write_page(path, pages, folder):
    """One file of the repository -> one page of the site."""
    renderer = Prose(path, pages, folder)
    body = {".ipynb": notebook, ".py": module, ".md": text}[path.suffix](path, renderer)
    chapters = {p: page for p, page in pages.items() if p.suffix == ".ipynb"}
    lines = []
    for chapter, page in chapters.items():
        here = ' aria-current="page"' if chapter == path else ""
        lines.append(f'<li><a href="{renderer.root}{page}"{here}>{heading(chapter)}</a></li>')
    title = re.sub(r"<[^>]+>", "", re.search(r"<h1.*?>(.*?)</h1>", body)[1])
    words = dict(title=title, root=renderer.root, body=body, chapters="\n".join(lines))
    words["steps"] = steps(path, chapters) if path in chapters else ""
    (folder / pages[path]).parent.mkdir(parents=True, exist_ok=True)
    (folder / pages[path]).write_text(PAGE.format(**words), encoding="utf-8")


def main(folder=ROOT / "_site"):
    """Write the whole site into a folder."""
    pages = all_pages()
    for path in pages:
        write_page(path, pages, folder)
    light, dark = (HtmlFormatter(style=s).get_style_defs() for s in ("default", "github-dark"))
    style = (ROOT / ".ci" / "pages.css").read_text(encoding="utf-8")
    dark = f"@media (prefers-color-scheme: dark) {{\n{dark}\n}}"
    (folder / "style.css").write_text(f"{light}\n{dark}\n{style}", encoding="utf-8")
    print(f"{len(pages)} pages: open {folder / 'index.html'}")


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
