"""Runs of the newer backbones from end to end: each algorithm, and each key of memory and speed, under the trainer."""

import json
import shutil

import pytest
import torch
from builders.messages import says
from builders.recipes import config
from safetensors.torch import load_file

from rsaft_fast.sampling.protocol import LORA_FILE
from rsaft_fast.train.loop import train

GUIDED = {"sampler": {"steps": 3, "guidance_scale": 3.0}}
REDNESS = {"name": "python", "path": "builders.toy_reward:redness", "differentiable": False}
GROUPS = {"data__group_size": 2, "data__prompts_per_iteration": 2, "reward": REDNESS}
GROUPS |= {"smoothing": {"image": None, "parameters": {"rho": 0.05}}}
GARDO = {"gate": None, "diversity": None, "kl_weight": 0.1, "reference": {"kl_threshold": 1e-9, "max_age": 2}}
RUNS = {
    "draft": GUIDED | {"method": {"name": "draft", "k": 2}, "smoothing": {"parameters": {"rho": 0.05}}},
    "little memory": GUIDED
    | {
        "method": {"name": "draft", "uncond": "detached"},
        "backbone__checkpoint": ["denoiser", "decoder-strips"],
        "backbone__offload_blocks": 2,
        "backbone__quantize": "nf4",
    },
    "one call for both branches": GUIDED
    | {
        "speed": {"cfg": "batched"},
        "method": {"name": "drtune", "k": 2},
        "backbone__checkpoint": ["denoiser", "decoder"],
        "backbone__keep_blocks": 1,
    },
    "full": GUIDED
    | {
        "method": {"name": "draft", "uncond": "detached"},
        "parameters": {"train": "full"},
        "backbone__dtype": "bf16",
        "backbone__checkpoint": ["denoiser", "decoder-strips"],
        "smoothing": {"parameters": {"rho": 0.05}},
        "optimizer__state_bits": 8,
        "optimizer__stochastic_rounding": True,
        "optimizer__release_gradients": True,
        "logging": {"tensorboard": False, "diagnostics": False},
    },
    "grpo": GUIDED | GROUPS | {"method": {"name": "flow_grpo", "updates": 2}},
    "nft": {"sampler": {"steps": 3}} | GROUPS | {"method": {"name": "nft"}},
    "gardo on grpo": {"sampler": {"steps": 3}} | GROUPS | {"method": {"name": "flow_grpo", "gardo": GARDO}},
    "gardo on nft": {"sampler": {"steps": 3}} | GROUPS | {"method": {"name": "nft", "gardo": GARDO}},
}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:this is not the instruction")
@pytest.mark.parametrize("run", RUNS)
@pytest.mark.parametrize("family", ["klein", "zimage", "qwen", "krea"])
def test_runs_go_through_and_move_the_weights(tiny, tmp_path, family, run):
    settings = config(tiny, tmp_path / "run", family, **RUNS[run])
    outcome = train(settings, log=lambda line: None)
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2] and all(line["reward"] == line["reward"] for line in lines)
    assert not any(line.get("skipped") for line in lines)
    if run == "full":
        assert any(file.suffix == ".safetensors" for file in outcome.export.iterdir())
        return
    state = load_file(outcome.export / LORA_FILE)
    moved = [name for name, tensor in state.items() if ".lora_B." in name and tensor.any()]
    assert len(moved) > 4 and all(torch.isfinite(tensor).all() for tensor in state.values())


def test_who_trains_a_distilled_model_is_warned_once(tiny, tmp_path):
    settings, lines = config(tiny, tmp_path / "run", "klein", **GUIDED), []
    turbo = tmp_path / "klein-turbo"
    shutil.copytree(settings.backbone.path, turbo)
    settings = settings.model_copy(update={"backbone": settings.backbone.model_copy(update={"path": str(turbo)})})
    train(settings.model_copy(update={"max_steps": 1}), log=lines.append)
    assert sum(bool(says("warning", "klein-turbo", "distilled").search(line)) for line in lines) == 1


@pytest.mark.slow
@pytest.mark.parametrize("family", ["klein", "zimage", "qwen", "krea"])
def test_a_run_in_two_halves_is_one_run(tiny, tmp_path, family):
    """Prompts of unequal lengths are drawn again, their encodings read from the cache."""
    keys = GUIDED | {"checkpoint_every": 1, "data__encoding_cache": str(tmp_path / "cache")}
    train(config(tiny, tmp_path / "whole", family, **keys), log=lambda line: None)
    train(config(tiny, tmp_path / "halves", family, **keys, max_steps=1), log=lambda line: None)
    train(config(tiny, tmp_path / "halves", family, **keys, resume="auto"), log=lambda line: None)
    ends = [load_file(tmp_path / name / "checkpoints/step_2/weights.safetensors") for name in ("whole", "halves")]
    assert ends[0].keys() == ends[1].keys() and all(torch.equal(ends[0][n], ends[1][n]) for n in ends[0])
