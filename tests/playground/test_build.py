"""The build: deterministic, resumable, in the formats that diffusers and transformers read."""

import json
import shutil
from dataclasses import replace

import pytest
import torch

from rsaft_fast.files import sha256_of
from rsaft_fast.playground import REWARDS, train_prompts
from rsaft_fast.playground.build import denoiser, stages
from rsaft_fast.playground.build.record import hashes
from rsaft_fast.playground.build.settings import Attack, Denoiser, Examination, Proxy, Settings, Vae
from rsaft_fast.playground.build.text import tokenizer, vocabulary
from rsaft_fast.playground.scenes import parse

FEW = Proxy(seed=0, pairs=6, steps=3, batch=4, width=16, layers=1, text_layers=1, match_images=4, match_batch=2)
KINDS = {
    "fair": {"match": 1.0},
    "brittle": {"mixed_quality": False},
    "adversarial": {"attack": Attack(rounds=2, pictures=2, steps=1, climb_steps=1, updates=1, batch=2)},
}
TINY = Denoiser(steps=3, batch=4, width=16, layers=1, heads=1, pool=8, warmup=1, long_every=3)
MINIATURE = Settings(
    vae=Vae(steps=4, batch=4, channels=(8, 8)),
    denoiser=TINY,
    layout=replace(TINY, seed=2, references=3),
    guidance=replace(TINY, seed=1, guidance=0.5),
    sampler_steps=(3, 2),
    proxies={name: replace(FEW, seed=seed, **KINDS.get(name, {})) for seed, name in enumerate(REWARDS)},
    examination=Examination(pairs=6, pictures=4, gradient_pictures=2),
    threads=dict.fromkeys((*stages.PIPELINE, "proxies"), 1),
)


@pytest.fixture(scope="module")
def build(tmp_path_factory):
    before = torch.get_num_threads()
    folder = tmp_path_factory.mktemp("build")
    stages.run(MINIATURE, folder / "work", folder / "assets")
    yield folder
    torch.set_num_threads(before)


def record(folder):
    return json.loads((folder / "assets" / "build.json").read_text())


@pytest.mark.slow
def test_two_builds_are_the_same_bits(build, tmp_path):
    stages.run(MINIATURE, tmp_path / "work", tmp_path / "assets")
    first, second = hashes(build / "assets"), hashes(tmp_path / "assets")
    assert first == second and len(first) > 20
    assert str(record(build)["stages"]["cards"]["results"]) == str(record(tmp_path)["stages"]["cards"]["results"])


@pytest.mark.slow
def test_the_record_names_settings_losses_and_files(build):
    made = record(build)
    assert made["settings"]["denoiser"]["steps"] == 3 and made["settings"]["threads"]["vae"] == 1
    assert set(made["stages"]) == set(stages.STAGES)
    assert made["files"] == hashes(build / "assets")
    cards = made["stages"]["cards"]["results"]
    assert tuple(sorted(REWARDS)) == tuple(sorted(cards))
    for card in cards.values():
        assert all(-1 <= value <= 1 for value in card["gradient_cosine"].values())
    assert all(f"`{name}`" in (build / "assets" / "cards.md").read_text() for name in REWARDS)
    # What each attack achieved is recorded, round by round.
    assert [row.keys() for row in made["stages"]["adversarial"]["results"]["fooled"]] == [{"climbed", "fine-tuned"}] * 2


@pytest.mark.slow
def test_a_finished_stage_is_not_run_again(build, monkeypatch):
    def refuse(*_):
        raise AssertionError("ran again")

    monkeypatch.setattr(stages, "STAGES", dict.fromkeys(stages.STAGES, refuse))
    before = hashes(build / "assets")
    stages.run(MINIATURE, build / "work", build / "assets")
    assert hashes(build / "assets") == before


@pytest.mark.slow
@pytest.mark.parametrize(
    "changed, again",
    [
        ("pipeline/scheduler/scheduler_config.json", [*REWARDS, "cards"]),
        ("rewards/brittle/config.json", ["cards"]),
    ],
)
def test_what_was_made_for_other_files_is_made_again(build, tmp_path, monkeypatch, changed, again):
    shutil.copytree(build, tmp_path / "build")
    work, assets = tmp_path / "build" / "work", tmp_path / "build" / "assets"
    with (assets / changed).open("a") as file:
        file.write("\n")
    ran = []
    recorded = {stage: lambda *_, stage=stage: ran.append(stage) for stage in stages.STAGES}
    monkeypatch.setattr(stages, "STAGES", recorded)
    stages.run(MINIATURE, work, assets)
    assert ran == again


@pytest.mark.slow
def test_rewards_alone_are_made_for_a_pipeline_that_is_there_and_its_record_stays(build, tmp_path, monkeypatch):
    shutil.copytree(build / "assets", tmp_path / "assets")
    monkeypatch.setattr(stages, "STAGES", {s: run for s, run in stages.STAGES.items() if s in ("vae", "brittle")})
    stages.run(MINIATURE, tmp_path / "work", tmp_path / "assets", stages=stages.JUDGES)
    made, before = record(tmp_path)["stages"], record(build)["stages"]
    assert not (tmp_path / "work" / "vae").exists()
    assert made["vae"] == before["vae"]
    assert made["brittle"]["losses"] == before["brittle"]["losses"]
    assert hashes(tmp_path / "assets") == hashes(build / "assets")


@pytest.mark.slow
def test_a_broken_stage_leaves_no_result(build, tmp_path, monkeypatch):
    def breaks(settings, work, assets, log):
        (work / "half").write_text("written")
        raise RuntimeError("broken")

    monkeypatch.setattr(stages, "STAGES", {"vae": breaks})
    with pytest.raises(RuntimeError, match="broken"):
        stages.run(MINIATURE, tmp_path / "work", tmp_path / "assets")
    assert not (tmp_path / "work" / "vae").exists()


@pytest.mark.slow
def test_training_broken_off_goes_on_to_the_same_bits(build, tmp_path, monkeypatch):
    class Killed(Exception):
        pass

    def die(average, trained, decay, kept=denoiser._follow):
        kept(average, trained, decay)
        if (tmp_path / "work" / "denoiser.partial" / stages.STATE).exists():  # that of the step before
            raise Killed

    shutil.copytree(build / "work" / "vae", tmp_path / "work" / "vae")
    monkeypatch.setattr(denoiser, "SAVE_EVERY", 1)
    with monkeypatch.context() as patched, pytest.raises(Killed):
        patched.setattr(denoiser, "_follow", die)
        stages.run(MINIATURE, tmp_path / "work", tmp_path / "assets", ["denoiser"])
    stages.run(MINIATURE, tmp_path / "work", tmp_path / "assets", ["denoiser"])
    weights = "transformer/diffusion_pytorch_model.safetensors"
    assert sha256_of([tmp_path / "work" / "denoiser" / weights]) == sha256_of([build / "work" / "denoiser" / weights])
    assert not list((tmp_path / "work" / "denoiser").glob("*.pt"))


def test_the_target_is_the_posterior_mean_over_scenes_of_the_prompt():
    torch.manual_seed(3)
    candidates = torch.randn(2, 4, 1, 2, 2, dtype=torch.float64)
    sigma = torch.tensor([0.9, 0.01], dtype=torch.float64)
    noisy = (1 - sigma[:, None, None, None]) * candidates[:, 0] + 0.005
    densities = torch.stack(
        [
            torch.distributions.Normal((1 - sigma)[:, None, None, None] * candidates[:, i], sigma[:, None, None, None])
            .log_prob(noisy)
            .sum((1, 2, 3))
            for i in range(4)
        ],
        dim=1,
    ).exp()
    wanted = torch.einsum("bi,bichw->bchw", densities / densities.sum(1, keepdim=True), candidates)
    mean = denoiser._posterior_mean(noisy, sigma, candidates)
    torch.testing.assert_close(mean, wanted)
    torch.testing.assert_close(mean[1], candidates[1, 0])  # little noise: the own scene


def test_scenes_of_the_same_prompt_are_drawn():
    prompts = ["a", "b", "a", "c", "a"]
    drawn = denoiser._Alike(prompts).draw(
        torch.tensor([0, 1, 3]), torch.tensor([False, False, True]), 200, torch.Generator().manual_seed(0)
    )
    assert set(drawn[0].tolist()) == {0, 2, 4} and set(drawn[1].tolist()) == {1}
    assert set(drawn[2].tolist()) == {0, 1, 2, 3, 4}


def test_each_word_is_one_token_and_any_text_is_taken():
    made = tokenizer(16)
    for word in vocabulary():
        assert len(made(word)["input_ids"]) == 3  # begin, word, end
    for prompt in train_prompts():
        parse(prompt)
        assert len(made(prompt)["input_ids"]) == len(prompt.split()) + 2
    assert made.decode(made("a purple cat")["input_ids"], skip_special_tokens=True).strip() == "a purple cat"
