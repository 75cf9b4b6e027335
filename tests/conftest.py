"""What several test files share, and what a run reports at its end."""

import functools
import os
from importlib.util import find_spec

import pytest
import torch

from utils import sources


def pytest_configure(config):
    config.addinivalue_line("markers", "tiny_en: uses OpenAI's tiny.en")
    config.addinivalue_line("markers", "posix: forks, or sends signals to processes")


@pytest.fixture(scope="module")
def one_thread():
    """PyTorch computes on one thread: sums come in one order, and small models are no slower."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@functools.cache
def tiny_en_problem():
    """Why OpenAI's `tiny.en` cannot be had here: None, or the reason for which tests are skipped.

    WITHOUT_TINY_EN=1 acts as if it could not: do the cells that use it carry the tag?
    """
    missing = find_spec(sources.PACKAGED) is None or "WITHOUT_TINY_EN" in os.environ
    try:
        if "WITHOUT_TINY_EN" in os.environ:
            raise ValueError("it is not to be used.")
        sources.download("tiny.en")  # finds it, and reads no weights
    except ValueError as problem:
        why = "the set-up could not install its package" if missing else "its package is damaged"
        return f"needs tiny.en, but {why}, and {problem}"


def pytest_collection_modifyitems(items):
    """Tests marked `tiny_en` and notebook cells tagged `needs-tiny-en` are skipped without it.

    So are, on Windows, the tests marked `posix`.
    """
    for item in items:
        if item.get_closest_marker("posix") and os.name != "posix":
            item.add_marker(pytest.mark.skip(reason="needs POSIX"))
        tags = item.cell.metadata.get("tags", []) if hasattr(item, "cell") else []
        if ("needs-tiny-en" in tags or item.get_closest_marker("tiny_en")) and tiny_en_problem():
            item.add_marker(pytest.mark.skip(reason=tiny_en_problem()))


# Reasons for which CI may leave a test out; it sets STRICT_SKIPS=1, and any other reason fails.
ALLOWED_SKIPS = ("needs a GPU", "COLAB_VERSIONS=1", "root may write everywhere", "needs POSIX")
ALLOWED_SKIPS += ("root reads all files",)
ALLOWED_SKIPS += ("needs tiny.en, but the set-up could not install its package",)


def forbidden_skips(reporter):
    """Tests that were left out for another reason -> lines of name and reason."""
    if os.environ.get("STRICT_SKIPS") != "1":
        return []
    skipped = [(r.nodeid, str(r.longrepr[-1])) for r in reporter.stats.get("skipped", [])]
    return [f"{n}: {why}" for n, why in skipped if not any(a in why for a in ALLOWED_SKIPS)]


def pytest_terminal_summary(terminalreporter):
    done = [r for kind in ("passed", "failed") for r in terminalreporter.stats.get(kind, [])]
    cells = sum(".ipynb::" in report.nodeid for report in done)
    terminalreporter.write_line(f"{len(done) - cells} tests, {cells} notebook cells")
    for line in forbidden_skips(terminalreporter):
        terminalreporter.write_line(f"may not be skipped here: {line}", red=True)


def pytest_sessionfinish(session):
    """With STRICT_SKIPS=1 a run with forbidden skips fails (in the process that reports)."""
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    if reporter and not hasattr(session.config, "workerinput") and forbidden_skips(reporter):
        session.exitstatus = session.exitstatus or pytest.ExitCode.TESTS_FAILED
