"""JupyterLab in a real browser: run a notebook, move its sliders, see the pictures change.

Skipped without Chromium, its driver or selenium.
"""

import base64
import re

import nbformat
import pytest
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


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    profile = f"user-data-dir={tmp_path_factory.mktemp('profile')}"
    with chromium(profile, "window-size=1400,1000") as driver:
        yield driver


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    """JupyterLab on copies of the notebooks without outputs."""
    folder = tmp_path_factory.mktemp("lab")
    (folder / "notebooks").mkdir()
    for path in ROOT.glob("notebooks/*.ipynb"):
        book = nbformat.read(path, as_version=4)
        book.metadata.pop("widgets", None)
        for cell in book.cells:
            if cell.cell_type == "code":
                cell.outputs, cell.execution_count = [], None
        nbformat.write(book, folder / "notebooks" / path.name)
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


def sliders(notebook):
    """How many sliders the cells of a notebook make."""
    book = nbformat.read(notebook, as_version=4)
    code = [cell.source for cell in book.cells if cell.cell_type == "code"]
    return len(code), sum(len(re.findall(r"widgets\.(?:Int|Float)Slider\(", c)) for c in code)


WITH_SLIDERS = [path for path in sorted(ROOT.glob("notebooks/*.ipynb")) if sliders(path)[1]]


@pytest.mark.posix
@pytest.mark.parametrize("notebook", WITH_SLIDERS, ids=lambda path: path.stem)
def test_sliders_change_the_picture(browser, lab, notebook):
    browser.get(lab.page(f"notebooks/{notebook.name}"))
    cells, number = sliders(notebook)
    run_all(browser, cells)
    shown = browser.find_elements(By.CSS_SELECTOR, ".widget-slider")
    assert len(shown) >= number
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
