"""What several test files share."""

import pytest

from utils import data


@pytest.fixture(scope="module")
def one_thread():
    """PyTorch computes on one thread: sums come in one order, and small models are no slower."""
    with data.single_thread():
        yield
