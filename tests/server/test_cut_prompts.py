"""A served reward that cuts a prompt says so in the server's log, once for each."""

from __future__ import annotations

import logging
from types import SimpleNamespace

import torch
from builders.clip import write_clip
from builders.messages import says

from rsaft_fast.rewards import load_reward
from rsaft_fast.server.batching import Batcher


def test_cut_prompts_are_logged_once(tmp_path, caplog):
    reward = load_reward("clip", write_clip(tmp_path))
    batcher = Batcher(reward, torch.device("cpu"), None, 8, 8)
    long, images = "a long prompt of many letters", torch.rand(2, 3, 16, 16)
    with caplog.at_level(logging.WARNING, "rsaft_fast.server.batching"):
        for _ in range(2):
            scores = batcher._score([SimpleNamespace(images=images, prompts=["red", long])])
    assert torch.equal(scores, reward.score(images, ["red", long]))
    (record,) = caplog.records
    assert says("clip", 16, "tokens").search(record.getMessage()) and repr(long) in record.getMessage()
