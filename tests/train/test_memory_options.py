"""The optimizer's memory options in a whole run: 8-bit state, stochastic rounding, released gradients."""

from __future__ import annotations

import shutil

import pytest
import torch
from builders.messages import says
from builders.recipes import config
from train.test_loop import same_files, without_time

from rsaft_fast.errors import UserError
from rsaft_fast.optim import release
from rsaft_fast.train import checkpoint as checkpoints
from rsaft_fast.train.inputs import check_config
from rsaft_fast.train.logging import read_metrics
from rsaft_fast.train.loop import train
from rsaft_fast.train.trainer import Trainer

LOW = {
    "parameters": {"train": "full"},
    "backbone__dtype": "bf16",
    "optimizer__state_bits": 8,
    "optimizer__stochastic_rounding": True,
}
RELEASED = LOW | {"optimizer__release_gradients": True}


@pytest.mark.parametrize("overrides", [LOW, RELEASED, {**LOW, "optimizer__backup": "gradient"}])
def test_low_memory_runs_resume_bit_for_bit(tiny, tmp_path, overrides):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    settings = dict(max_steps=3, checkpoint_every=1, keep_checkpoints=None, **overrides)
    train(config(tiny, whole, "sd3", **settings))
    shutil.copytree(whole, broken)
    shutil.rmtree(broken / "checkpoints" / "step_3")
    train(config(tiny, broken, "sd3", resume="auto", **settings), log=lambda line: None)
    same_files(whole / "checkpoints/step_3", broken / "checkpoints/step_3")
    records = read_metrics(broken)
    assert without_time(records) == without_time(read_metrics(whole))
    assert all((record["grad_norm"] is None) == ("optimizer__release_gradients" in overrides) for record in records)


def test_released_runs_train_to_the_same_weights(tiny, tmp_path):
    """Unclipped: clipping is what release changes."""
    for name, overrides in (("waited", LOW), ("released", RELEASED)):
        train(config(tiny, tmp_path / name, "sd3", max_steps=2, optimizer__max_grad_norm=None, **overrides))
    same_files(tmp_path / "waited/checkpoints/step_2", tmp_path / "released/checkpoints/step_2")


@pytest.mark.parametrize(
    ("overrides", "line"),
    [
        ({"optimizer__stochastic_rounding": True}, says("optimizer.stochastic_rounding", "parameters.train lora")),
        ({**LOW, "backbone__dtype": "fp32"}, says("optimizer.stochastic_rounding", "backbone.dtype fp32", "bf16")),
        ({**RELEASED, "data__accumulate": 3}, says("optimizer.release_gradients", "data.accumulate", 3, 1)),
        (
            {**RELEASED, "smoothing": {"parameters": None}},
            says("optimizer.release_gradients", "smoothing.parameters null"),
        ),
        (
            {**RELEASED, "method": {"name": "draft", "k": 2}},
            says("optimizer.release_gradients", "draft", 2, "speed.cfg=batched"),
        ),
        (
            {**RELEASED, "sampler": {"steps": 2, "guidance_scale": 3.0}},
            says("optimizer.release_gradients", "draft", 2, "speed.cfg=batched"),
        ),
        (
            {**RELEASED, "family": "flux", "sampler__true_cfg_scale": 2.0},
            says("optimizer.release_gradients", "draft", 2, "speed.cfg=batched"),
        ),
        ({"sampler__true_cfg_scale": 2.0}, says("sampler.true_cfg_scale", 2.0, "FLUX.1", "sampler.guidance_scale")),
    ],
)
def test_options_that_do_not_fit_are_refused_before_anything_loads(tiny, out, overrides, line):
    with pytest.raises(UserError, match=line):
        check_config(config(tiny, out, **overrides))
    assert not out.exists()


def test_an_embedded_guidance_scale_leaves_one_backward_pass_to_release(tiny, out):
    settings = config(tiny, out, "flux", sampler={"steps": 2, "guidance_scale": 3.5}, **RELEASED)
    train(settings)
    records = read_metrics(out)
    assert len(records) == 2 and all(record["skipped"] == 0 for record in records)


@pytest.mark.parametrize("checkpointed", [True, False])
def test_memory_running_out_inside_the_released_backward_goes_back_to_the_checkpoint(
    tiny, out, monkeypatch, checkpointed
):
    trainers, said, stepped = [], [], []
    settings = config(tiny, out, "sd3", max_steps=3, checkpoint_every=1 if checkpointed else 3, **RELEASED)
    new, step = Trainer.__init__, release.ops.sam_adamw_step_tensor_

    def remembered(self, *arguments):
        trainers.append(self)
        new(self, *arguments)

    def exhausted(*arguments, **options):
        stepped.append(1)
        if trainers[0].step == 1 and len(stepped) > len(trainers[0].parameters) + 5:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
        return step(*arguments, **options)

    monkeypatch.setattr(Trainer, "__init__", remembered)
    monkeypatch.setattr(release.ops, "sam_adamw_step_tensor_", exhausted)
    with pytest.raises(UserError, match=says("out of memory", "update 2", "half done", "backbone.checkpoint=")):
        train(settings, log=said.append)
    trainer = trainers[0]
    if checkpointed:
        assert said[-1].startswith("the update broke off half done: back at") and "after update 1" in said[-1]
        assert not trainer.optimizer.half_stepped and trainer.step == 1
        saved = checkpoints.read(checkpoints.newest(out / "checkpoints")[0])
        assert all(torch.equal(p, saved.weights[name]) for name, p in trainer.parameters.items())
    else:
        assert "no checkpoint" in said[-1] and trainer.optimizer.half_stepped
        assert not list(out.glob("checkpoints/step_*"))


@pytest.mark.slow
@pytest.mark.parametrize("overrides", [{"parameters": {"train": "full"}, "backbone__dtype": "bf16"}, RELEASED])
def test_state_on_the_host_trains_to_the_same_checkpoint_and_resumes_in_either_place(tiny, tmp_path, overrides):
    """Byte for byte the same files, wherever the state was, and wherever the run goes on from."""
    device, host, moved = (tmp_path / name for name in ("device", "host", "moved"))
    settings = dict(max_steps=3, checkpoint_every=1, keep_checkpoints=None, **overrides)
    train(config(tiny, device, "sd3", **settings))
    train(config(tiny, host, "sd3", **settings, optimizer__offload="state"))
    same_files(device / "checkpoints/step_3", host / "checkpoints/step_3")
    shutil.copytree(device, moved)
    for step in (2, 3):
        shutil.rmtree(moved / f"checkpoints/step_{step}")
    train(config(tiny, moved, "sd3", resume="auto", **settings, optimizer__offload="state"), log=lambda line: None)
    same_files(device / "checkpoints/step_3", moved / "checkpoints/step_3")
