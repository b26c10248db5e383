"""Runs of one process and of many, and how far they are apart."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from PIL import Image

from builders.ranks import trained
from builders.recipes import config
from rsaft_fast.train import checkpoint as checkpoints

UPDATES = 5
BOTH = {"image": {"radius": 0.3}, "parameters": {"rho": 0.2}}
WEIGHTS_ALONE = {"image": None, "parameters": {"rho": 0.2}}
COMMON = {"max_steps": UPDATES, "checkpoint_every": UPDATES, "sampler__steps": 3, "smoothing": BOTH}
COMMON |= {"samples": {"every": UPDATES, "count": 3}, "optimizer": {"lr": 1e-3}, "data__batch_size": 2}
# Two micro-batches of an update on one process, one or a half on several.
REWARD_GRADIENT = COMMON | {"data__accumulate": 2, "data__plan_scope": "micro-batch"}
GARDO = {"gate": {"share": 0.2}, "diversity": {"features": "DINO"}, "gate_convention": "code"}
GROUPS = COMMON | {
    "max_steps": 6,
    "checkpoint_every": 6,
    "smoothing": WEIGHTS_ALONE,
    "data__group_size": 2,
    "data__prompts_per_iteration": 5,  # more on one rank than on the other, and micro-batches that are not full
}
FULL = {"parameters__train": "full", "distributed": {"strategy": "replicate", "timeout": 120}}
SHARD = FULL | {"distributed": {"strategy": "shard", "timeout": 120}}
CASES = {
    "draft": REWARD_GRADIENT | {"method": {"name": "draft"}},
    "drtune": REWARD_GRADIENT | FULL | {"method": {"name": "drtune"}, "ema": {"decay": 0.9}},
    "leaps, bi_lora": REWARD_GRADIENT
    | {
        "method": {"name": "flowbp_lagrange"},
        "sampler": {"steps": 3},
        "smoothing": {"image": {"radius": 0.3}, "parameters": {"rho": 0.1, "direction": "bi_lora"}},
    },
    "flow_grpo": GROUPS | {"method": {"name": "flow_grpo", "updates": 1, "gardo": GARDO}},
    "flow_grpo, 3 updates": GROUPS
    | {"method": {"name": "flow_grpo", "updates": 3, "gardo": GARDO}, "data__prompts_per_iteration": 6},
    "nft": GROUPS | FULL | {"method": {"name": "nft"}, "sampler__steps": 2, "data__prompts_per_iteration": 4},
}


def made(tiny, aux, folder, case, **keys):
    keys = CASES[case] | keys
    method = dict(keys["method"])
    if "gardo" in method:
        method["gardo"] = method["gardo"] | {"diversity": {"features": str(aux / "dino")}}
        proxy = {"name": "clip", "path": str(tiny.clip), "label": "proxy"}
        light = {"name": "clip", "path": str(aux), "label": "light", "weight": 0}
        keys["reward"] = {"name": "combination", "parts": [proxy, light]}
    return config(tiny, folder, "sd3", **(keys | {"method": method}))


def wide(config):
    """The same in float64, which no recipe may ask for."""
    double = {"backbone": config.backbone.model_copy(update={"dtype": "fp64"})}
    return config.model_copy(update=double | {"reward": config.reward.model_copy(update={"dtype": "fp64"})})


def records(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def checkpoint(run, step=None):
    """The newest checkpoint of a run, or a step's, whole on the host, whoever wrote it."""
    folder = checkpoints.newest(run / "checkpoints")[0] if step is None else run / f"checkpoints/step_{step}"
    return checkpoints.read(folder).filled()


def largest_difference(first, second, step=None):
    """Of weights and their copies, each relative to its norm."""
    ours, theirs = checkpoint(first, step), checkpoint(second, step)
    assert ours.step == theirs.step and ours.algorithm.keys() == theirs.algorithm.keys()
    assert ours.copies.keys() == theirs.copies.keys()
    pairs = [(ours.weights, theirs.weights)] + [(ours.copies[name], theirs.copies[name]) for name in ours.copies]
    return max(distance(own, other) for own, other in pairs)


def distance(ours, theirs):
    """Between tensors by name, all together, relative to the first ones' norm."""
    assert ours.keys() == theirs.keys()
    whole = torch.cat([tensor.flatten().double() for tensor in ours.values()])
    other = torch.cat([theirs[name].flatten().double() for name in ours])
    return float((whole - other).norm() / whole.norm())


def same_run(one, many, close, levels=0):
    """Pictures before training, to the byte or to so many levels of 255; every figure of every update; the weights."""
    first, other = (run / "samples/step_0.png" for run in (one, many))
    if levels == 0:
        assert first.read_bytes() == other.read_bytes()
    else:
        apart = np.array(Image.open(first)).astype(int) - np.array(Image.open(other)).astype(int)
        assert np.abs(apart).max() <= levels
    ours, theirs = records(one), records(many)
    assert [record.keys() for record in ours] == [record.keys() for record in theirs]
    for before, after in zip(ours, theirs):
        for name in before.keys() - {"seconds", "old_gap"}:  # the gap is rounding itself
            expected = before[name] if before[name] is None else pytest.approx(before[name], rel=2e-3, abs=1e-5)
            assert after[name] == expected, (before["step"], name)
    difference = largest_difference(one, many)
    assert difference < close, difference
    return ours


def compared(tiny, aux, tmp_path, case, counts, close=1e-6, change=lambda config: config, **keys):
    trained(1, tmp_path, change(made(tiny, aux, tmp_path / "one", case, **keys)))
    for count in counts:
        many = tmp_path / f"of {count}"
        trained(count, tmp_path / f"logs {count}", change(made(tiny, aux, many, case, **keys)))
        found = same_run(tmp_path / "one", many, close)
    return found
