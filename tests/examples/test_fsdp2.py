"""The FSDP2 example on two ranks, with its checkpoint in the middle, against float64 on the joint batch."""

import pytest
import torch
from builders.ranks import computed

from examples.reference import distance, example, textbook
from examples.test_loops import numbers, on, task

STEPS = 24


def run(rank, folder):
    return example("fsdp2").main(rank, 2, STEPS, f"{folder}/checkpoint")


@pytest.mark.slow
def test_shards_resumed_in_the_middle_are_sam_on_the_joint_batch(tmp_path):
    ranks = computed(2, tmp_path, run, str(tmp_path))
    start = task.network().cpu().double()
    steps = [[on(x.cpu().double(), y.cpu())] for x, y in task.batches(STEPS)]
    truth = textbook(task.network().cpu().double(), steps, max_norm=1.0, lr=5e-3)
    model = task.network().cpu()
    for rank in ranks:
        model.load_state_dict(rank)
        assert distance(model, truth, start) < 1e-5
    assert all(torch.equal(ranks[0][name], ranks[1][name]) for name in ranks[0])
    seen = numbers((tmp_path / "0.log").read_text())
    assert seen["last"] < seen["first"] and seen["accuracy"] > 0.3
