"""An algorithm from outside the package trains by the command line, is estimated, checkpointed and resumed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import yaml
from builders.messages import says
from builders.recipes import recipe
from safetensors.torch import load_file

from rsaft_fast.cli import main
from rsaft_fast.errors import UserError
from rsaft_fast.phases import DENOISER, SAMPLING
from rsaft_fast.recipe.load import load_config
from rsaft_fast.train.checkpoint import read
from rsaft_fast.train.loop import train

OWN = {"name": "python", "call": "doors.toy_algorithm:WeightedRegression", "arguments": {"temperature": 0.1}}


def written(tiny, folder: Path, **keys) -> str:
    """A recipe file of the toy algorithm, with a weight perturbation."""
    options = {"max_steps": 4, "checkpoint_every": 2, "sampler": {"steps": 3, "guidance_scale": 3.0}}
    options |= {"data__batch_size": 2, "smoothing": {"image": None, "parameters": {"rho": 0.1}}, "method": OWN}
    file = folder.with_suffix(".yaml")
    file.write_text(yaml.safe_dump(recipe(tiny, folder, **options | keys)))
    return str(file)


def records(folder: Path) -> list[dict]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key != "seconds"} for line in lines]


def test_it_trains_and_resumes_to_the_same_bits(tiny, tmp_path, capfd):
    assert main(["train", written(tiny, tmp_path / "whole")]) == 0
    assert "largest weight" in capfd.readouterr().err
    assert main(["train", written(tiny, tmp_path / "halves", max_steps=2)]) == 0
    assert main(["train", written(tiny, tmp_path / "halves"), "resume=auto"]) == 0
    whole, halves = tmp_path / "whole", tmp_path / "halves"
    assert records(whole) == records(halves) and [line["step"] for line in records(whole)] == [1, 2, 3, 4]
    assert records(whole)[0]["reward"] == records(whole)[1]["reward"] != records(whole)[2]["reward"]
    assert all(line["eps_norm"] > 0 and line["loss"] > 0 for line in records(whole))
    ends = [load_file(folder / "checkpoints/step_4/weights.safetensors") for folder in (whole, halves)]
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])
    baselines = [read(whole / f"checkpoints/step_{step}").algorithm["baseline"] for step in (2, 4)]
    assert baselines[0] != 0 and baselines[0] != baselines[1]


def test_its_memory_is_estimated(tiny, tmp_path, capsys):
    assert main(["estimate", written(tiny, tmp_path / "run"), "--quick", "--json"]) == 0
    phases = {phase["name"] for phase in json.loads(capsys.readouterr().out)["phases"]}
    assert {SAMPLING, DENOISER} <= phases


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"method": OWN | {"call": "doors.toy_algorithm"}}, ("method.call", "module:callable")),
        ({"method": OWN | {"call": "doors.no_such:thing"}}, ("method.call", "doors.no_such")),
        ({"method": OWN | {"call": "doors.toy_algorithm:absent"}}, ("method.call", "absent")),
        ({"method": OWN | {"call": "doors.toy_algorithm:not_one"}}, ("method.call", "not_one", "Algorithm")),
        ({"method": OWN | {"call": "doors.toy_algorithm:broken"}}, ("method.call", "OSError", "table.bin")),
        ({"method": OWN | {"call": "doors.toy_algorithm:something_else"}}, ("method.call", "dict", "Algorithm")),
        ({"method": OWN | {"arguments": {"warmth": 1}}}, ("method.call", "warmth")),
        ({"max_steps": 3}, ("max_steps", "3", "2")),
        ({"optimizer": {"lr": 1e-3, "release_gradients": True}}, ("release_gradients", "python")),
    ],
)
def test_what_is_wrong_is_said_in_a_line(tiny, tmp_path, capsys, keys, said):
    assert main(["train", written(tiny, tmp_path / "run", **keys)]) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("rsaft-fast: ")]
    assert all(word in line for word in said), line
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_checkpoint_of_another_kind_is_refused(tiny, tmp_path):
    assert main(["train", written(tiny, tmp_path / "run")]) == 0
    other = {"method": {"name": "draft"}, "max_steps": 6}
    with pytest.raises(UserError, match=r"(?s)algorithm.*baseline"):
        train(load_config(written(tiny, tmp_path / "run", **other), ["resume=auto"]))


def test_a_checkpoint_within_an_iteration_is_refused(tiny, tmp_path):
    draft = {"method": {"name": "draft"}, "max_steps": 1}
    assert main(["train", written(tiny, tmp_path / "run", **draft)]) == 0
    with pytest.raises(UserError, match=says("resume", 1, 2, "updates")):
        train(load_config(written(tiny, tmp_path / "run"), ["resume=auto"]))
