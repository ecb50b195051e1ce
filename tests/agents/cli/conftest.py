"""Fixtures of the command line's tests."""

import pytest

from tests.agents.cli.support import TINY, train


@pytest.fixture(scope="session")
def finished(tmp_path_factory):
    """A run of two iterations of two images. It is read, not changed."""
    folder = tmp_path_factory.mktemp("runs") / "finished"
    assert train(folder, "--images", "3", "--seed", "1", *TINY) == 0
    return folder
