"""Sections by names of the user's own (judges), and a number that may be "auto": read, refused and shown."""

from __future__ import annotations

import pytest
import yaml
from builders.messages import says
from builders.recipes import recipe

from rsaft_fast.errors import UserError
from rsaft_fast.recipe import schema
from rsaft_fast.recipe.config import Config
from rsaft_fast.recipe.load import load_config, to_yaml


@pytest.fixture
def path(tiny, out, tmp_path):
    file = tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump(recipe(tiny, out)))
    return file


def test_judges_are_given_by_name_and_survive_being_written(path, tiny):
    found = load_config(
        path,
        [
            f"agreement.judges.mine.path={tiny.clip}",
            "agreement.judges.other={name: pickscore, path: x}",
            "smoothing.image.radius=auto",
            f"smoothing.radius_search.judges.third.path={tiny.clip}",
        ],
    )
    assert {name: judge.name for name, judge in found.judges.items()} == {
        "mine": "clip",
        "other": "pickscore",
        "third": "clip",
    }
    assert found.smoothing.image.radius == "auto" and found.fixed_pictures == 64
    assert load_config(yaml.safe_load(to_yaml(found))) == found.model_copy(update={"loss": found.training_loss})


@pytest.mark.parametrize(
    ("override", "line"),
    [
        ("agreement.judges.mine.pathh=x", says("agreement.judges.mine.pathh", "agreement.judges.mine.path?")),
        ("agreement.judges.mine.name=clipp", says("agreement.judges.mine.name", "clipp", "clip")),
        ("agreement.judges={}", says("agreement.judges", 1)),
        ("agreement.judges={'a b': {path: x}}", says("agreement.judges", "a b")),
        ("agreement.judges={a: 3}", says("agreement.judges.a", 3)),
        ("agreement.contrl=stop", says("agreement.contrl", "agreement.control?")),
        ("agreement.pictures=4", says("agreement.pictures", 4, 8)),
        ("smoothing.image.radius=0", says("smoothing.image.radius", 0, "auto", "smoothing.image=null")),
        ("smoothing.image.radius=automatic", says("smoothing.image.radius", "automatic", "a number", "auto")),
        ("smoothing.radius_search.radii=[1, 0.5]", says("smoothing.radius_search.radii", "ascend")),
        ("smoothing.radius_search.radii=[]", says("smoothing.radius_search.radii", 1, 64)),
        ("smoothing.radius_search.radii=[0]", says("smoothing.radius_search.radii[0]", 0, "greater than 0")),
    ],
)
def test_what_is_wrong_in_them_is_named_by_its_whole_key(path, override, line):
    with pytest.raises(UserError) as refused:
        load_config(path, [override])
    assert any(line.search(text) for text in str(refused.value).splitlines())


def test_every_key_of_a_judge_can_be_asked_for():
    text = schema.help_text(Config, key="agreement.judges.NAME.dtype")
    assert says("agreement.judges.NAME", "fp32").search(text)
    whole = schema.help_text(Config)
    assert "NAME: a section each" in whole and whole.count("judges:") == 2
