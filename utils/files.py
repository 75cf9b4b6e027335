"""Files: written whole or not at all, and errors that say what to do."""

import errno
import os
import re
from contextlib import contextmanager
from pathlib import Path


def write_atomic(path, data):
    """Write bytes so that `path` holds either the old file or the whole new one, never a half."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    try:
        with open(part, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


@contextmanager
def as_value_error(what, advice):
    """Within this block any failure becomes a `ValueError` of one sentence."""
    try:
        yield
    except Exception as problem:
        cause = re.split(r"\n|\. ", f"{type(problem).__name__}: {problem}")[0].rstrip(".")
        raise ValueError(f"{what} ({cause}): {advice}.") from problem


def disk_is_full(problem):
    """Whether a full disk is behind the exception `problem`, or behind what caused it."""
    while problem is not None:
        if getattr(problem, "errno", None) in (errno.ENOSPC, errno.EDQUOT):
            return True
        if "disk space" in f"{problem}":
            return True
        problem = problem.__cause__ or problem.__context__
    return False
