"""JupyterLab in a real browser: run a notebook, move its slider, see the picture change.

Skipped without Chromium, its driver or selenium.
"""

import base64

import nbformat
import pytest
from lab import ROOT, chromium, jupyterlab, needs_browser
from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.wait import WebDriverWait

pytestmark = needs_browser
PICTURE = """
const [image, done] = arguments;
fetch(image.src).then(answer => answer.blob()).then(blob => {
  const reader = new FileReader();
  reader.onload = () => done(reader.result.split(",")[1]);
  reader.readAsDataURL(blob);
}).catch(problem => done(""));
"""
PROMPTS = """
return [...document.querySelectorAll(".jp-CodeCell .jp-InputPrompt")].map(p => p.textContent)
"""
ERRORS = """
return [...document.querySelectorAll('[data-mime-type="application/vnd.jupyter.error"]')]
  .map(error => error.textContent)
"""


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    profile = f"user-data-dir={tmp_path_factory.mktemp('profile')}"
    with chromium(profile, "window-size=1400,1000") as driver:
        yield driver


def wait(driver, condition, what, seconds=60):
    return WebDriverWait(driver, seconds).until(condition, f"waited in vain for {what}")


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    """JupyterLab on copies of the notebooks without outputs -> the address of a notebook."""
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
    with jupyterlab(folder) as address:
        yield lambda name: address(f"notebooks/{name}")


def click(driver, kind, text):
    """Click the visible menu entry that says `text`."""
    path = f"//*[contains(@class, '{kind}')][normalize-space()='{text}']"
    wait(driver, lambda d: [e for e in d.find_elements(By.XPATH, path) if e.is_displayed()], text)
    next(e for e in driver.find_elements(By.XPATH, path) if e.is_displayed()).click()


def run_all(driver, cells):
    """Run all cells by the menu, and wait until the last one has its number."""
    wait(driver, lambda d: len(d.execute_script(PROMPTS)) == cells, "the notebook's cells")
    idle = ".jp-NotebookPanel .jp-Notebook-ExecutionIndicator[data-status='idle']"
    wait(driver, lambda d: d.find_elements(By.CSS_SELECTOR, idle), "the kernel")
    click(driver, "lm-MenuBar-itemLabel", "Run")
    click(driver, "lm-Menu-itemLabel", "Run All Cells")
    numbers = [f"[{n}]:" for n in range(1, cells + 1)]
    done = lambda d: d.execute_script(ERRORS) or d.execute_script(PROMPTS) == numbers  # noqa: E731
    wait(driver, done, "the last cell", seconds=240)
    assert driver.execute_script(ERRORS) == []


def png(driver, image):
    return base64.b64decode(driver.execute_async_script(PICTURE, image))


@pytest.mark.parametrize("name", ["02_tokenizer.ipynb"])
def test_a_slider_changes_the_picture(browser, lab, name):
    book = nbformat.read(ROOT / "notebooks" / name, as_version=4)
    browser.get(lab(name))
    run_all(browser, sum(cell.cell_type == "code" for cell in book.cells))
    (slider,) = wait(
        browser, lambda d: d.find_elements(By.CSS_SELECTOR, ".widget-slider"), "the slider"
    )
    image = browser.find_element(By.CSS_SELECTOR, "img.widget-image")
    browser.execute_script("arguments[0].scrollIntoView({block: 'center'})", slider)
    before = png(browser, image)
    assert before.startswith(b"\x89PNG")
    handle = slider.find_element(By.CSS_SELECTOR, ".noUi-handle")
    ActionChains(browser).click(handle).send_keys(Keys.HOME).perform()
    after = wait(browser, lambda d: (now := png(d, image)) != before and now, "another picture")
    assert after.startswith(b"\x89PNG")
    ActionChains(browser).send_keys(Keys.END).perform()
    wait(browser, lambda d: png(d, image) not in (before, after), "a third picture")
