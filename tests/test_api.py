"""The public names: where they are, what importing them costs, and training from Python."""

import json
import subprocess
import sys
from importlib import resources
from pathlib import Path

import pytest
import torch
import yaml
from builders.fixtures import out, tiny  # noqa: F401
from builders.recipes import config, recipe

import rsaft_fast
from rsaft_fast.rewards.python import handed_over


def test_every_public_name_is_there_and_none_hides_a_subpackage():
    folder = Path(str(resources.files(rsaft_fast)))
    modules = {path.stem for path in folder.iterdir() if path.is_dir() or path.suffix == ".py"}
    assert not modules & set(rsaft_fast.__all__)
    assert all(getattr(rsaft_fast, name) is not None for name in rsaft_fast.__all__)
    assert set(rsaft_fast.__all__) <= set(dir(rsaft_fast))
    with pytest.raises(AttributeError, match="absent"):
        rsaft_fast.absent  # noqa: B018


def test_an_optimizer_alone_imports_no_models():
    code = (
        "import sys; from rsaft_fast import SAM, SAMAdamW, UserError; SAMAdamW; "
        "print([name for name in ('diffusers', 'transformers', 'pydantic', 'matplotlib') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def brightness(images, prompts):
    return images.mean((1, 2, 3))


class Darkness(rsaft_fast.Reward):
    """Without a spec, and with what counts in training mode alone."""

    def __init__(self):
        super().__init__()
        self.forget = torch.nn.Dropout(1.0)

    def preprocess(self, images):
        return images

    def score_inputs(self, inputs, prompts):
        return -self.forget(inputs).mean((1, 2, 3))


@pytest.mark.parametrize("own", [brightness, Darkness()], ids=["function", "Reward"])
def test_a_reward_that_is_handed_over_is_trained_on_and_recorded(tiny, out, own):  # noqa: F811
    keys = recipe(tiny, out, max_steps=2, checkpoint_every=2)
    del keys["reward"]
    outcome = rsaft_fast.finetune(keys, ["optimizer.lr=0.01"], reward=own, log=lambda line: None)
    assert (outcome.step, outcome.folder) == (2, out)
    written = yaml.safe_load((out / "config.yaml").read_text())
    name = "brightness" if own is brightness else "Darkness"
    assert written["reward"]["name"] == "python" and written["reward"]["path"].endswith(f"test_api:{name}")
    assert written["optimizer"]["lr"] == 0.01
    records = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert all((record["reward"] > 0) == (own is brightness) and record["reward"] != 0 for record in records)


def test_what_is_no_reward_is_refused(tiny, out):  # noqa: F811
    with pytest.raises(rsaft_fast.UserError, match="images and prompts"):
        rsaft_fast.finetune(recipe(tiny, out), reward=lambda pixels: pixels)
    assert not out.exists()


def test_memory_is_estimated_from_python(tiny, out):  # noqa: F811
    found = rsaft_fast.estimate_memory(config(tiny, out))
    small = rsaft_fast.estimate_memory(recipe(tiny, out), ["data.batch_size=1"])
    assert small.peak < found.peak and found.largest.name in {phase.name for phase in found.phases}


@pytest.mark.parametrize(
    ("options", "overrides", "said"),
    [
        ({"reward": brightness}, ["reward.path=playground/fair"], "reward.path"),
        ({"backbone": "playground"}, [], "str"),
        ({"backbone": Darkness}, [], "type"),
    ],
)
def test_what_is_handed_over_wrongly_is_one_line(tiny, out, options, overrides, said):  # noqa: F811
    with pytest.raises(rsaft_fast.UserError, match=said):
        rsaft_fast.finetune(recipe(tiny, out), overrides, **options)
    assert not out.exists()


def test_another_reward_is_another_identity():
    loud, quiet = (torch.nn.Linear(1, 1) for _ in range(2))
    loud.forward = quiet.forward = lambda images, prompts: images.mean((1, 2, 3))
    specs = [handed_over(own)[0].spec.sha256 for own in (brightness, Darkness(), loud, quiet, loud)]
    assert all(specs) and len(set(specs)) == 4 and specs[2] == specs[4]
