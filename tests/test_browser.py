"""JupyterLab in a real browser: run what sliders need, move them, see the pictures change.

Skipped without Chromium, its driver or selenium.
"""

import base64
import re
import symtable

import nbformat
import pytest
from IPython.core.inputtransformer2 import TransformerManager
from lab import ROOT, chromium, jupyterlab, needs_browser, run_all, wait
from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys

pytestmark = needs_browser
PICTURE = """
const [image, done] = arguments;
fetch(image.src).then(answer => answer.blob()).then(blob => {
  const reader = new FileReader();
  reader.onload = () => done(reader.result.split(",")[1]);
  reader.readAsDataURL(blob);
}).catch(problem => done(""));
"""


SLIDER = re.compile(r"widgets\.(?:Int|Float)Slider\(")


def global_names(source):
    """-> the global names that a cell assigns, and those that it reads and does not assign."""
    scopes = [symtable.symtable(TransformerManager().transform_cell(source), "cell", "exec")]
    assigned, read = set(), set()
    for scope in scopes:
        scopes += scope.get_children()
        top = scope.get_type() == "module"
        for symbol in scope.get_symbols():
            if top and (symbol.is_assigned() or symbol.is_imported()):
                assigned.add(symbol.get_name())
            if symbol.is_referenced() and (top or symbol.is_global()):
                read.add(symbol.get_name())
    return assigned, read - assigned


def what_sliders_need(path):
    """A notebook of the cells with sliders, and of those before that assign what they read.

    `--nbval` runs all cells.
    """
    book, kept, needed = nbformat.read(path, as_version=4), [], set()
    book.metadata.pop("widgets", None)
    for cell in reversed(book.cells):
        if cell.cell_type == "code" and "needs-tiny-en" not in cell.metadata.get("tags", []):
            assigned, read = global_names(cell.source)
            if SLIDER.search(cell.source) or assigned & needed:
                kept, needed = [cell, *kept], needed - assigned | read
                cell.outputs, cell.execution_count = [], None
    book.cells = kept
    return book


CHAPTERS = {path.name: what_sliders_need(path) for path in sorted(ROOT.glob("notebooks/*.ipynb"))}
CHAPTERS = {name: book for name, book in CHAPTERS.items() if book.cells}


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    profile = f"user-data-dir={tmp_path_factory.mktemp('profile')}"
    with chromium(profile, "window-size=1400,1000") as driver:
        yield driver


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    """JupyterLab on the chapters with sliders."""
    folder = tmp_path_factory.mktemp("lab")
    (folder / "notebooks").mkdir()
    for name, book in CHAPTERS.items():
        nbformat.write(book, folder / "notebooks" / name)
    (folder / "data").symlink_to(ROOT / "data")
    with jupyterlab(folder) as lab:
        yield lab


def png(driver, image):
    return base64.b64decode(driver.execute_async_script(PICTURE, image))


def move(driver, handle, key, image, before):
    """Press a key on a slider's handle -> the picture when it is another one than `before`."""
    driver.execute_script("arguments[0].focus()", handle)  # a click would put it on its raster
    ActionChains(driver).send_keys(key).perform()
    return wait(driver, lambda d: (now := png(d, image)) != before and now, "another picture")


@pytest.mark.posix
@pytest.mark.parametrize("chapter", CHAPTERS)
def test_sliders_change_the_picture(browser, lab, chapter):
    browser.get(lab.page(f"notebooks/{chapter}"))
    code = [cell.source for cell in CHAPTERS[chapter].cells]
    run_all(browser, len(code))
    shown = browser.find_elements(By.CSS_SELECTOR, ".widget-slider")
    assert len(shown) >= len(SLIDER.findall("".join(code)))
    for slider in shown:
        output = slider.find_element(By.XPATH, "./ancestor::*[contains(@class, 'jp-OutputArea')]")
        image = output.find_element(By.CSS_SELECTOR, "img.widget-image")
        browser.execute_script("arguments[0].scrollIntoView({block: 'center'})", slider)
        handle = slider.find_element(By.CSS_SELECTOR, ".noUi-handle")
        pictures = [png(browser, image)]
        for key in (Keys.END, Keys.HOME, Keys.END):
            pictures.append(move(browser, handle, key, image, pictures[-1]))
        assert all(picture.startswith(b"\x89PNG") for picture in pictures)
        assert pictures[1] == pictures[3] != pictures[2], "the same place, another picture"
    lab.stop_kernels()
