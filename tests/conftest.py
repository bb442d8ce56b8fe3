"""What several files of tests need around each of theirs."""

import pytest


@pytest.fixture
def quiet_transformers():
    """Tiny shapes contradict what some families were published with, and transformers says so by its logger."""
    import transformers

    before = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    yield
    transformers.logging.set_verbosity(before)
