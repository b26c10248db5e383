import pytest
from builders.clip import write_clip
from builders.fixtures import out, tiny  # noqa: F401
from builders.reward_server import Mean, serving

from rsaft_fast.rewards import load_reward


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_clip(tmp_path_factory.mktemp("clip"))


@pytest.fixture(scope="module")
def local(folder):
    return load_reward("clip", folder)


@pytest.fixture(scope="module")
def server(local):
    with serving({"clip": local, "mean": Mean()}, max_pictures=4, max_bytes=60_000, timeout=10) as url:
        yield url
