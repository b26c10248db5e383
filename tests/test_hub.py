"""Why the hub did not give a repository: told apart, in one line, and at once."""

from __future__ import annotations

import time

import pytest
from builders.messages import says

from rsaft_fast.backbones import adapter_for, load_backbone
from rsaft_fast.backbones.folder import _hub_folder
from rsaft_fast.errors import UserError
from rsaft_fast.rewards import RewardSettings, load_reward

huggingface_hub = pytest.importorskip("huggingface_hub")
http = pytest.importorskip("huggingface_hub.utils._http")
httpx = pytest.importorskip(huggingface_hub.errors.HTTPError.__module__.partition(".")[0])


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """The hub's own client, with a network that answers as it is told."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    _hub_folder.cache_clear()

    def answer(handle):
        huggingface_hub.set_client_factory(lambda: httpx.Client(transport=httpx.MockTransport(handle)))

    before = http._GLOBAL_CLIENT_FACTORY
    yield answer
    huggingface_hub.set_client_factory(before)
    _hub_folder.cache_clear()


def refused(status, **headers):
    return lambda request: httpx.Response(
        status, headers={"x-request-id": "1", **headers}, json={"error": "no"}, request=request
    )


def unplugged(request):
    raise httpx.ConnectError("Name or service not known", request=request)


def slow(request):
    raise httpx.ConnectTimeout("timed out", request=request)


ANSWERS = {
    "offline": (unplugged, ["offline", "Name or service", "local folder"]),
    "timeout": (slow, ["offline", "local folder"]),
    "absent": (refused(404, **{"x-error-code": "RepoNotFound"}), ["repository of the hub", "hf auth login"]),
    "private": (refused(401), ["hf auth login"]),
    "gated": (
        refused(403, **{"x-error-code": "GatedRepo"}),
        ["gated", "https://huggingface.co/owner/name", "hf auth login"],
    ),
    "broken": (refused(400), ["HTTP 400", "later"]),
}


@pytest.mark.parametrize("case", ANSWERS)
@pytest.mark.parametrize("asked", ["pipeline", "reward"])
def test_each_reason_has_its_own_line_and_mend(hub, asked, case):
    handle, words = ANSWERS[case]
    hub(handle)
    started = time.monotonic()
    with pytest.raises(UserError) as caught:
        if asked == "pipeline":
            load_backbone("owner/name")
        else:
            load_reward(RewardSettings(name="clip", path="owner/name"))
    line = str(caught.value)
    assert time.monotonic() - started < 2
    assert "\n" not in line and asked in line and all(word in line for word in words), line
    others = {"gated": "gated", "offline": "offline"}
    assert not any(word in line for name, word in others.items() if name != case and word not in words), line


def test_not_asked_is_no_network_failure(monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(UserError, match=says("'owner/name'", "HF_HUB_OFFLINE")):
        adapter_for("owner/name")
