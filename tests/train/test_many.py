"""Several processes make the run of one: the same pictures, weights and figures; and they end together."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import pytest
from builders.many import CASES, compared, largest_difference, records, wide
from builders.messages import says
from builders.ranks import command
from builders.recipes import config, recipe, write_recipe

from rsaft_fast.distributed import launch
from rsaft_fast.distributed.launch import Place, find_place
from rsaft_fast.errors import UserError
from rsaft_fast.recipe.check_several import check_several


@pytest.mark.parametrize("case", ["draft", "flow_grpo, 3 updates"])
def test_two_processes_make_the_run_of_one(tiny, aux, tmp_path, case):
    short = {"max_steps": 3, "checkpoint_every": 3}
    found = compared(tiny, aux, tmp_path, case, [2], change=lambda config: config.model_copy(update=short))
    assert len(found) == 3 and all(record["eps_norm"] > 0 for record in found)


# The second adapter begins at zero, where Adam's step is a sign that rounding decides: it is compared in float64.
@pytest.mark.slow
@pytest.mark.parametrize("case", [case for case in CASES if "bi_lora" not in case])
def test_four_processes_make_the_run_of_one(tiny, aux, tmp_path, case):
    compared(tiny, aux, tmp_path, case, [4])


@pytest.mark.slow
@pytest.mark.parametrize("case", ["drtune", "leaps, bi_lora", "nft"])
def test_in_float64_they_agree_to_its_rounding(tiny, aux, tmp_path, case):
    short = {"max_steps": 2, "checkpoint_every": 2}  # double precision is slow here
    compared(tiny, aux, tmp_path, case, [2], 1e-12, lambda config: wide(config).model_copy(update=short))


# -- how a run of several ends -----------------------------------------------------------------------------------------


def written(tiny, folder, **keys):
    """The recipe's file."""
    common = {"max_steps": 400, "checkpoint_every": 1, "data__accumulate": 2, "optimizer": {"lr": 1e-3}}
    return write_recipe(folder / "recipe.yaml", recipe(tiny, folder / "run", "sd3", **(common | keys)))


def wait_for_a_checkpoint(run, ranks, seconds=120):
    end = time.monotonic() + seconds
    while not list(run.glob("checkpoints/step_*/COMPLETE")):
        assert time.monotonic() < end, ranks.said(0)
        time.sleep(0.01)


def last_step(run):
    return max(int(path.parent.name.removeprefix("step_")) for path in run.glob("checkpoints/step_*/COMPLETE"))


@pytest.mark.slow
def test_a_signal_on_one_rank_ends_all_after_the_update_and_another_number_goes_on(tiny, tmp_path):
    run, whole, path = tmp_path / "run", tmp_path / "whole", written(tiny, tmp_path)
    ranks = command(2, tmp_path / "first", "train", path)
    wait_for_a_checkpoint(run, ranks)
    ranks.signal(1, signal.SIGTERM)
    assert ranks.wait() == [128 + signal.SIGTERM] * 2
    stopped = last_step(run)
    assert f"stopped by SIGTERM after update {stopped} of 400" in ranks.said(0) and ranks.said(1) == ""
    assert [record["step"] for record in records(run)] == list(range(1, stopped + 1))
    ends = [f"max_steps={stopped + 1}", "keep_checkpoints=null"]
    assert command(1, tmp_path / "second", "train", path, "resume=auto", *ends).wait() == [0]
    assert command(2, tmp_path / "third", "train", path, f"output_dir={whole}", *ends).wait() == [0] * 2
    assert largest_difference(whole, run, stopped + 1) < 1e-6
    assert (run / "lora/pytorch_lora_weights.safetensors").is_file()


@pytest.mark.slow
def test_an_error_on_one_rank_ends_all_with_one_line_that_names_it(tiny, tmp_path):
    reward = {"name": "python", "path": "builders.ranks:nan_on_rank_1"}
    path = written(tiny, tmp_path, reward=reward, sharpness=None, smoothing=None, distributed={"timeout": 60})
    ranks = command(2, tmp_path / "logs", "train", path)
    assert ranks.wait(60) == [2, 2]
    errors = [line for rank in (0, 1) for line in ranks.said(rank).splitlines() if "rsaft-fast: error: " in line]
    assert len(errors) == 1 and "rank 1 of 2" in errors[0] and "nan" in errors[0]


def test_what_is_wrong_on_all_ranks_is_said_once(tiny, tmp_path):
    path = written(tiny, tmp_path, data__batch_size=1, data__accumulate=1)
    ranks = command(2, tmp_path / "logs", "train", path)
    assert ranks.wait(60) == [2, 2]
    assert "1 prompts" in ranks.said(0) and "2 processes" in ranks.said(0) and ranks.said(1) == ""
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
@pytest.mark.parametrize("killed", [0, 1, 2])
def test_a_rank_that_is_killed_ends_the_others_and_nothing_is_lost(tiny, tmp_path, killed, monkeypatch):
    monkeypatch.setattr(launch, "PATIENCE", 4.0)
    run, path = tmp_path / "run", written(tiny, tmp_path, data__accumulate=3, distributed={"timeout": 60})
    ranks = command(3, tmp_path / "first", "train", path)
    wait_for_a_checkpoint(run, ranks)
    ranks.signal(killed)
    codes = ranks.wait(60)
    assert codes.pop(killed) == -signal.SIGKILL and -signal.SIGKILL not in codes
    errors = [line for rank in range(3) for line in ranks.said(rank).splitlines() if "rsaft-fast: error: " in line]
    assert all(f"rank {killed}" in line for line in errors), errors
    if killed:  # the notes of all are on rank 0 where no launcher keeps them
        assert len(errors) == 1 and f"process {ranks.pids[killed]} on" in errors[0]
    stopped = last_step(run)
    ends = [f"max_steps={stopped + 1}", "keep_checkpoints=null"]
    assert command(3, tmp_path / "second", "train", path, "resume=auto", *ends).wait() == [0] * 3
    whole = tmp_path / "whole"
    assert command(3, tmp_path / "third", "train", path, f"output_dir={whole}", *ends).wait() == [0] * 3
    assert largest_difference(whole, run, stopped + 1) == 0


def test_what_several_processes_cannot_do_is_refused(tiny, tmp_path):
    with pytest.raises(UserError, match=says("optimizer.release_gradients", "2 processes")):
        check_several(config(tiny, tmp_path / "run", optimizer__release_gradients=True), 2)


TORCHRUN = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "MASTER_ADDR": "a", "MASTER_PORT": "1"}
SRUN = {"SLURM_PROCID": "3", "SLURM_STEP_NUM_TASKS": "4", "SLURM_LOCALID": "1", "MASTER_ADDR": "a", "MASTER_PORT": "1"}


def test_launchers_say_which_process_this_is():
    assert find_place(TORCHRUN) == find_place(SRUN) == Place(3, 4, 1)
    assert find_place({}) is find_place({"SLURM_NTASKS": "4", "SLURM_PROCID": "0"}) is None
    assert find_place(TORCHRUN | {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}) is None


@pytest.mark.parametrize(
    ("variables", "said"),
    [
        (TORCHRUN | {"RANK": "four"}, ("RANK", "'four'")),
        (TORCHRUN | {"RANK": "4"}, ("RANK is 4", "WORLD_SIZE 4")),
        ({name: value for name, value in TORCHRUN.items() if name != "LOCAL_RANK"}, ("LOCAL_RANK",)),
        (SRUN | {"MASTER_ADDR": ""}, ("4 processes", "MASTER_ADDR", "export")),
    ],
)
def test_a_launcher_that_says_too_little_is_told(variables, said):
    with pytest.raises(UserError, match=says(*said)):
        find_place(variables)


@pytest.mark.slow
def test_a_second_run_in_the_same_processes_does_not_read_what_the_first_left(tmp_path):
    """torchrun keeps its store for as long as they live."""
    script = tmp_path / "two.py"
    keys = "playground.yaml max_steps=1 samples.every=0 report=false logging.tensorboard=false data.batch_size=2"
    script.write_text(
        "from rsaft_fast.cli import main\n"
        f"for run in range(2): assert main(['train', *{keys.split()!r}, f'output_dir={tmp_path}/{{run}}']) == 0\n"
    )
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", script]
    subprocess.run(launcher, check=True, timeout=200, env=os.environ | {"CUDA_VISIBLE_DEVICES": ""})
    assert all((tmp_path / f"{run}/metrics.jsonl").is_file() for run in range(2))
