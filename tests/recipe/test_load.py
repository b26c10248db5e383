"""Recipes: overrides, the nearest valid key, error lines, and that every key is documented and every recipe valid."""

from __future__ import annotations

import re
import shlex
from importlib import resources
from pathlib import Path

import pytest
import yaml
from builders.messages import says
from builders.recipes import recipe

from rsaft_fast.errors import UserError
from rsaft_fast.recipe import schema
from rsaft_fast.recipe.check import check_keys
from rsaft_fast.recipe.config import Config
from rsaft_fast.recipe.load import find_recipe, load_config, parse_override, read_yaml, to_yaml, validate

RECIPES = Path(str(resources.files("rsaft_fast.recipes")))
SHIPPED = sorted(path.relative_to(RECIPES).as_posix() for path in RECIPES.rglob("*.yaml"))


@pytest.fixture
def path(tiny, out, tmp_path) -> Path:
    file = tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump(recipe(tiny, out)))
    return file


@pytest.mark.parametrize(
    ("override", "line"),
    [
        ("method.kk=3", says("method.kk", "command line", "method.k?")),
        ("methd.k=3", says("methd", "command line", "method?")),
        ("lr=3", says("lr", "command line", "optimizer.lr?")),
        ("optimiser={lr: 1.0}", says("optimiser", "command line", "optimizer?")),
        ("smoothing.image.radios=1", says("smoothing.image.radios", "smoothing.image.radius?")),
        ("parameters.lora.r=3", says("parameters.lora.r ", "parameters.lora.rank?")),
        (
            "smoothing.parameters.rho=0",
            says("smoothing.parameters.rho is 0", "command line", "greater than 0", "null"),
        ),
        ("smoothing.parameters.rho=-1e-2", says("smoothing.parameters.rho", -0.01, "command line", "greater than 0")),
        (
            "method.name=drat",
            says("method.name", "'drat'", "command line", "draft?", "refl, draft, draft_lv"),
        ),
        ("method.name=flowbp", says("'flowbp'", "did you mean flowbp_sparse or flowbp_bridge or flowbp_lagrange?")),
        ("method={}", says("missing", "method.name", "command line", "refl, draft, draft_lv, alignprop, drtune")),
        ("method=3", says("method is 3", "command line", "section")),
        ("max_steps=x", says("max_steps", "'x'", "command line", "whole number")),
        ("max_steps=1.5", says("max_steps", 1.5, "command line", "whole number")),
        ("backbone.dtype=fp8", says("backbone.dtype", "'fp8'", "command line", "fp32?")),
        ("optimizer.betas=[0.9]", says("optimizer.betas[1]", "missing", "command line")),
        ("optimizer.betas=[0.9, 1.0]", says("optimizer.betas[1]", 1.0, "command line", "less than 1")),
        ("optimizer.lr=.nan", says("optimizer.lr", "nan", "command line", "finite")),
        ("reward={}", says("missing", "reward.path", "command line", "hub id")),
        ("keep_checkpoints=0", says("keep_checkpoints", 0, "command line", 1)),
        ("zzz.qqq=1", says("zzz", "command line", "seed, output_dir")),
        ("foo", says("'foo'", "key=value")),
        ("seed=[1", says("seed", "'[1'", "command line", "YAML")),
    ],
)
def test_a_wrong_key_or_value_is_one_line_that_names_it(path, override, line):
    with pytest.raises(UserError) as raised:
        load_config(path, [override])
    assert line.search(str(raised.value))
    assert "\n" not in str(raised.value)


def test_every_fault_has_a_line_of_its_own(path):
    with pytest.raises(UserError) as raised:
        load_config(path, ["seed=-1", "max_steps=0", "method.kk=1"])
    assert len(str(raised.value).splitlines()) == 3


def test_a_fault_in_the_file_names_the_file(tiny, out, tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text(yaml.safe_dump(recipe(tiny, out, method__kk=3)))
    with pytest.raises(UserError, match=says("method.kk", "mine.yaml", "method.k?")):
        load_config(file)


def test_overrides_replace_the_recipes_keys(path):
    config = load_config(path, ["max_steps=7", "optimizer.lr=1e-5", "smoothing.image.radius=0.5", "ema.decay=0.9"])
    assert (config.max_steps, config.optimizer.lr, config.smoothing.image.radius) == (7, 1e-5, 0.5)
    assert config.ema.decay == 0.9
    assert config.data.batch_size == 2


def test_no_smoothing_is_null(path):
    smoothing = load_config(path, ["smoothing=null"]).smoothing
    assert smoothing.image is None and smoothing.parameters is None


def test_another_method_drops_the_recipes_keys_of_the_first(tiny, out, tmp_path):
    file = tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump(recipe(tiny, out, method={"name": "draft_lv", "n_extra": 1})))
    assert load_config(file, ["method.name=drtune", "method.k=2"]).method.k == 2
    assert load_config(file, ["method.name=draft_lv"]).method.n_extra == 1


def test_a_null_loss_is_the_methods_own_and_is_written_out(path):
    config = load_config(path, ["method.name=refl"])
    assert config.training_loss.map == "hinge"
    assert yaml.safe_load(to_yaml(config))["loss"]["scale"] == 1e-3


def test_the_resolved_configuration_reads_back_equal(path):
    config = load_config(path, ["ema.decay=0.9", "smoothing.parameters.groups=[{match: attn1, rho: 0.1}]"])
    again = validate(yaml.safe_load(to_yaml(config)), "config.yaml")
    assert again == config.model_copy(update={"loss": config.training_loss})


def test_resume_moves_into_that_run_unless_told_otherwise(path, tmp_path):
    run = tmp_path / "earlier"
    assert load_config(path, [f"resume={run}"]).output_dir == str(run)
    assert load_config(path, [f"resume={run}", "output_dir=elsewhere"]).output_dir == "elsewhere"
    assert load_config(path, ["resume=auto"]).output_dir == load_config(path).output_dir


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("seed: 1\nseed: 2\n", says("'seed'", "twice", "line 2")),
        ("- 1\n", says("list", "mapping")),
        ("", says("recipe.yaml", "nothing")),
        ("a: [1\n", says("recipe.yaml", "YAML")),
        ("a: !!python/object/apply:os.getcwd []\n", says("recipe.yaml", "YAML")),
    ],
)
def test_a_file_that_is_no_recipe_is_refused(tmp_path, text, line):
    file = tmp_path / "recipe.yaml"
    file.write_text(text)
    with pytest.raises(UserError) as raised:
        read_yaml(file)
    assert line.search(str(raised.value))


def test_numbers_with_an_exponent_and_no_point_are_numbers():
    assert parse_override("a.b=1e-5") == ("a.b", 1e-5)
    assert parse_override("a=-2E+3") == ("a", -2000.0)
    assert parse_override("a=1e") == ("a", "1e")


def test_a_missing_recipe_names_the_shipped_ones(tmp_path):
    with pytest.raises(UserError, match=says("'nothing.yaml'", "playground")):
        find_recipe("nothing.yaml")
    with pytest.raises(UserError, match=says(f"'{tmp_path}'", "folder", "playground")):
        find_recipe(tmp_path)
    with pytest.raises(UserError, match=says("'some/folder/playground.yaml'", "playground.yaml?")):
        find_recipe("some/folder/playground.yaml")


def test_a_shipped_recipe_is_found_by_name(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    for name in ("playground", "playground.yaml", "recipes/playground.yaml"):
        assert find_recipe(name).name == "playground.yaml"
    for name in ("paper/rsaft-sd15", "recipes/paper/rsaft-sd15.yaml"):
        assert find_recipe(name).name == "rsaft-sd15.yaml"
    with pytest.raises(UserError, match=says("paper/rsaft-sd15.yaml?")):
        find_recipe("paper/rsaft-sd51")


@pytest.mark.parametrize("name", SHIPPED)
def test_every_shipped_recipe_is_valid_and_its_method_fits_its_sampler(name):
    check_keys(load_config(find_recipe(name)))
    first = find_recipe(name).read_text().splitlines()[0]
    assert first.startswith(f"# rsaft-fast {'demo' if name == 'playground.yaml' else f'train {name}'}")


@pytest.mark.parametrize("path", sorted((RECIPES / "paper").glob("*.yaml")), ids=lambda path: path.stem)
def test_the_papers_recipes_hold_with_every_override_that_they_name(path):
    lines = path.read_text(encoding="utf-8").splitlines()
    text = "\n".join(line.lstrip("# ") for line in lines if line.startswith("#"))
    commands = re.findall(r"rsaft-fast train \S+ ?(.*)", text)
    assert len(commands) >= 2
    for command in commands:
        config = load_config(path, shlex.split(command.replace("=FILE", "=file.txt")))
        check_keys(config)
        assert config.smoothing.image is None or config.smoothing.image.radius == 1e-2
        assert config.pictures_per_iteration in (32, 48 * 24)


def test_the_papers_other_methods_hold_too():
    """What the header of GARDO's recipe names beside its commands."""
    nft = "method={name: nft, gardo: {kl_weight: 0.04, reference: {kl_threshold: 0.15}}}"
    flux = ["method.noise_level=0.9", "method.gardo.kl_weight=0.01", "parameters.lora.rank=64", "sampler.steps=6"]
    text = find_recipe("paper/gardo-sd35").read_text(encoding="utf-8")
    for overrides in ([nft, "sampler.guidance_scale=1"], flux, ["method.gardo.gate_convention=code"]):
        assert all(override in text for override in overrides), overrides
        check_keys(load_config("paper/gardo-sd35.yaml", overrides))


def test_every_key_says_what_it_does():
    for key, model, _ in schema.keys(Config):
        assert len(schema.describe(model, key.rpartition(".")[2])) > 10, key


def test_the_help_lists_every_key():
    text = schema.help_text(Config)
    for key, _, _ in schema.keys(Config):
        assert f"{key.rpartition('.')[2]}:" in text


_ALONE = ("reward={path: playground/brittle}",)


@pytest.mark.parametrize(
    ("overrides", "line"),
    [
        (_ALONE, says("method.gardo.gate", "weight 0", "null")),
        (("method.gardo.gate.auxiliaries=[lightt]",), says("method.gardo.gate.auxiliaries", "'lightt'", "light")),
        (("sharpness=null", "method.gardo.gate.signals={s1: 1}"), says("method.gardo.gate.signals.s1", "`sharpness`")),
        (
            (
                "reward={name: combination, parts: [{name: counting, path: playground}, {path: x, weight: 0}]}",
                "method.gardo.gate.signals={agreement: 1}",
            ),
            says("method.gardo.gate.signals.agreement", "gradients"),
        ),
    ],
)
@pytest.mark.parametrize("name", ["playground-gardo", "playground-nft"])
def test_a_gate_with_nothing_to_go_by_is_refused_before_anything_is_loaded(name, overrides, line):
    with pytest.raises(UserError, match=line):
        check_keys(load_config(find_recipe(name), list(overrides)))


@pytest.mark.parametrize(
    "overrides",
    [
        (*_ALONE, "method.gardo.gate=null"),
        (*_ALONE, "method.gardo=null"),
        (*_ALONE, "sharpness={radius: 0.3}", "method.gardo.gate.signals={win_rate: 0, s1: 1}"),
        ("reward={name: python, path: 'mine:combined'}",),  # it may be a combination: only loading it tells
    ],
)
def test_a_gate_that_may_have_something_to_go_by_is_not_refused(overrides):
    check_keys(load_config(find_recipe("playground-gardo"), list(overrides)))
