"""What several test files share, and what a run reports at its end."""

import os

import pytest

from utils import data


@pytest.fixture(scope="module")
def one_thread():
    """PyTorch computes on one thread: sums come in one order, and small models are no slower."""
    with data.single_thread():
        yield


# Reasons for which CI may leave a test out; it sets STRICT_SKIPS=1, and any other reason fails.
ALLOWED_SKIPS = ("needs a GPU", "COLAB_VERSIONS=1", "root may write everywhere")


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
