"""JupyterLab in a real browser: run a notebook, move its slider, see the picture change.

Skipped without Chromium, its driver or selenium.
"""

import base64
import json
import os
import secrets
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import nbformat
import pytest

webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed")
from selenium.webdriver.common.action_chains import ActionChains  # noqa: E402
from selenium.webdriver.common.by import By  # noqa: E402
from selenium.webdriver.common.keys import Keys  # noqa: E402
from selenium.webdriver.support.wait import WebDriverWait  # noqa: E402

ROOT = Path(__file__).parent.parent
NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
BROWSER = next(filter(None, map(shutil.which, NAMES)), None)
DRIVER = shutil.which("chromedriver")
pytestmark = pytest.mark.skipif(
    not (BROWSER and DRIVER), reason="Chromium or chromedriver is not installed"
)
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
    options = webdriver.ChromeOptions()
    options.binary_location = BROWSER
    profile = f"--user-data-dir={tmp_path_factory.mktemp('profile')}"
    for word in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", profile):
        options.add_argument(word)
    options.add_argument("--window-size=1400,1000")
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    driver.set_script_timeout(20)
    yield driver
    driver.quit()


def wait(driver, condition, what, seconds=60):
    return WebDriverWait(driver, seconds).until(condition, f"waited in vain for {what}")


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def settings(folder):
    """JupyterLab as it comes, but for two things: all cells are drawn, and no news is fetched."""
    for name, values in (
        ("notebook-extension/tracker", {"windowingMode": "none"}),
        ("apputils-extension/notification", {"fetchNews": "false", "checkForUpdates": False}),
    ):
        path = folder / "@jupyterlab" / f"{name}.jupyterlab-settings"
        path.parent.mkdir(parents=True)
        path.write_text(json.dumps(values), encoding="utf-8")
    return str(folder)


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
    places = {
        name: str(folder / f"jupyter-{name.lower()}") for name in ("CONFIG", "DATA", "RUNTIME")
    }
    env = {**os.environ, **{f"JUPYTER_{name}_DIR": place for name, place in places.items()}}
    env |= {"JUPYTERLAB_SETTINGS_DIR": settings(folder / "settings")}
    env |= {"IPYTHONDIR": str(folder / "ipython"), "JUPYTERLAB_WORKSPACES_DIR": str(folder / "ws")}
    port, token = free_port(), secrets.token_hex(16)
    command = [sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root"]
    command += [f"--ServerApp.port={port}", "--ServerApp.port_retries=0"]
    command += [f"--IdentityProvider.token={token}", f"--ServerApp.root_dir={folder}"]
    command += ["--LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate"]
    with (folder / "log").open("w") as log:
        server = subprocess.Popen(command, env=env, cwd=folder, stdout=log, stderr=log)
    try:
        wait_for_server(server, f"http://127.0.0.1:{port}/api/status?token={token}", folder / "log")
        base = f"http://127.0.0.1:{port}/lab/workspaces/test/tree/notebooks"
        yield lambda name: f"{base}/{name}?token={token}&reset"
    finally:
        server.terminate()
        server.wait(20)


def wait_for_server(server, address, log, seconds=60):
    for _ in range(10 * seconds):
        assert server.poll() is None, log.read_text()[-2000:]
        try:
            return urllib.request.urlopen(address, timeout=5).read()
        except OSError:
            time.sleep(0.1)
    pytest.fail(f"JupyterLab does not answer: {log.read_text()[-2000:]}")


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
