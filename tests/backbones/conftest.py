import shutil

import pytest
from builders.backbones import BUILDERS
from builders.fixtures import out, tiny  # noqa: F401


@pytest.fixture(scope="session")
def originals(tmp_path_factory):
    """A tiny pipeline's folder of each family; to be left as it is."""
    return {family: BUILDERS[family](tmp_path_factory.mktemp(family)) for family in BUILDERS}


@pytest.fixture
def copy(originals, tmp_path):
    """One of them to be changed, by family."""
    return lambda family: shutil.copytree(originals[family], tmp_path / family)
