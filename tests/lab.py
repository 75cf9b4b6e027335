"""JupyterLab and Chromium, started for the tests that need a real browser."""

import json
import os
import secrets
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed")
from selenium.webdriver.common.by import By  # noqa: E402
from selenium.webdriver.support.wait import WebDriverWait  # noqa: E402

ROOT = Path(__file__).parent.parent
NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
BROWSER = next(filter(None, map(shutil.which, NAMES)), None)
DRIVER = shutil.which("chromedriver")
needs_browser = pytest.mark.skipif(
    not (BROWSER and DRIVER), reason="Chromium or chromedriver is not installed"
)


@contextmanager
def chromium(*flags):
    """A browser without a window, as selenium's driver."""
    options = webdriver.ChromeOptions()
    options.binary_location = BROWSER
    for flag in ("headless=new", "no-sandbox", "disable-dev-shm-usage", *flags):
        options.add_argument(f"--{flag}")
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    driver.set_script_timeout(60)
    try:
        yield driver
    finally:
        driver.quit()


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


def places(folder):
    """The environment in which JupyterLab keeps all that it writes in `folder`."""
    kinds = ("CONFIG", "DATA", "RUNTIME")
    env = {f"JUPYTER_{kind}_DIR": str(folder / f"jupyter-{kind.lower()}") for kind in kinds}
    env |= {"JUPYTERLAB_SETTINGS_DIR": settings(folder / "settings")}
    env |= {"IPYTHONDIR": str(folder / "ipython"), "JUPYTERLAB_WORKSPACES_DIR": str(folder / "ws")}
    return {**os.environ, "PYTHONPATH": str(ROOT), **env}


@dataclass
class Lab:
    """A JupyterLab that runs on this machine."""

    port: int
    token: str

    def page(self, path):
        """The address of the notebook at `path` in its folder."""
        base = f"http://127.0.0.1:{self.port}/lab/workspaces/test/tree"
        return f"{base}/{path}?token={self.token}&reset"

    def ask(self, method, path):
        """The answer of its interface for programs to a request."""
        address = f"http://127.0.0.1:{self.port}/api/{path}?token={self.token}"
        request = urllib.request.Request(address, method=method)
        return urllib.request.urlopen(request, timeout=60).read()

    def stop_kernels(self):
        """End what the notebooks have started, so that the next one has the machine for itself."""
        for kernel in json.loads(self.ask("GET", "kernels")):
            self.ask("DELETE", f"kernels/{kernel['id']}")


@contextmanager
def jupyterlab(folder):
    """A `Lab` in `folder`, for as long as the block lasts."""
    lab = Lab(free_port(), secrets.token_hex(16))
    command = [sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root"]
    command += [f"--ServerApp.port={lab.port}", "--ServerApp.port_retries=0"]
    command += [f"--IdentityProvider.token={lab.token}", f"--ServerApp.root_dir={folder}"]
    command += ["--LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate"]
    with (folder / "log").open("w") as log:
        server = subprocess.Popen(command, env=places(folder), cwd=folder, stdout=log, stderr=log)
    try:
        wait_for_server(server, lab, folder / "log")
        yield lab
    finally:
        server.terminate()
        server.wait(60)


def wait_for_server(server, lab, log, seconds=240):
    for _ in range(10 * seconds):
        assert server.poll() is None, log.read_text()[-2000:]
        try:
            return lab.ask("GET", "status")
        except OSError:
            time.sleep(0.1)
    pytest.fail(f"JupyterLab does not answer: {log.read_text()[-2000:]}")


PROMPTS = """
return [...document.querySelectorAll(".jp-CodeCell .jp-InputPrompt")].map(p => p.textContent)
"""
ERRORS = """
return [...document.querySelectorAll('[data-mime-type="application/vnd.jupyter.error"]')]
  .map(error => error.textContent)
"""


def wait(driver, condition, what, seconds=240):
    return WebDriverWait(driver, seconds).until(condition, f"waited in vain for {what}")


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
    before = driver.execute_script(PROMPTS)

    def start(driver):
        """While JupyterLab connects to the kernel, it may ignore the click."""
        click(driver, "lm-MenuBar-itemLabel", "Run")
        click(driver, "lm-Menu-itemLabel", "Run All Cells")
        time.sleep(2)
        return driver.execute_script(PROMPTS) != before

    wait(driver, start, "a cell that runs")
    numbers = [f"[{n}]:" for n in range(1, cells + 1)]
    done = lambda d: d.execute_script(ERRORS) or d.execute_script(PROMPTS) == numbers  # noqa: E731
    wait(driver, done, "the last cell", seconds=900)
    assert driver.execute_script(ERRORS) == []
