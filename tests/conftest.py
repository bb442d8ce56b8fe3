"""What several files of tests need around each of theirs, and what bits depend on."""

import pytest
import torch

import another_processor

torch.compiler.config.cache_key_tag = torch.backends.cpu.get_cpu_capability()
"""inductor's cache on disk does not ask for which instructions its code was written: docs/exactness.md."""


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--sums",
        choices=["by-processor", "by-shape"],
        default="by-processor",
        help="by-shape: products are summed in an order that their shapes decide (tests/another_processor.py)",
    )


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("--sums") == "by-shape":
        another_processor.install()


@pytest.fixture
def quiet_transformers():
    """Tiny shapes contradict what some families were published with, and transformers says so by its logger."""
    import transformers

    before = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    yield
    transformers.logging.set_verbosity(before)
