"""Pickles become safetensors: the same scores to the bit, a header that says what they were, nothing half-written."""

from __future__ import annotations

import hashlib
import os
from dataclasses import replace
from functools import partial

import pytest
import torch
from builders.clip import write_clip
from builders.image_reward import head_state, write_image_reward
from builders.messages import says
from builders.open_clip import load_hps, write_hps
from safetensors import safe_open

from rsaft_fast.cli import main
from rsaft_fast.errors import UserError
from rsaft_fast.estimate.reward_skeleton import skeleton_reward
from rsaft_fast.rewards import RewardSettings, hps, load_reward
from rsaft_fast.rewards.calibration import find, measure
from rsaft_fast.rewards.convert import convert

PROMPTS = ["a red ox", "blue", "a big owl"]


@pytest.fixture(scope="module")
def tower(tmp_path_factory):
    return write_clip(tmp_path_factory.mktemp("tower"), text_act="quick_gelu", hidden_act="quick_gelu")


def written(reward, folder, tower):
    """A tiny pickle in its published layout, and how it is loaded from any path."""
    if reward.startswith("hpsv2"):
        path = write_hps(folder, hps.VERSIONS[reward].file)
        return path, lambda p: load_hps(p, reward, tokenizer=str(path))
    if reward == "imagereward":
        return write_image_reward(folder), partial(load_reward, "imagereward")
    if reward == "aesthetic":
        torch.save(head_state(12), folder / "sac+logos+ava1-l14-linearMSE.pth")
        return folder, lambda p: load_reward("aesthetic", p, image_tower=tower)
    write_clip(folder)
    model = load_reward("clip", folder).model
    torch.save(model.state_dict(), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    return folder, partial(load_reward, "clip")


@pytest.mark.parametrize("reward", ["hpsv2", "hpsv2.1", "imagereward", "aesthetic", "clip"])
def test_scores_are_the_same_to_the_bit(reward, tmp_path, tower, capsys):
    (tmp_path / "in").mkdir()
    source, load = written(reward, tmp_path / "in", tower)
    before = load(source)
    assert main(["convert", str(source), str(tmp_path / "out"), "--reward", reward]) == 0
    assert before.spec.sha256 in capsys.readouterr().out
    # Nothing of the original is needed any more.
    for pickle in [*(tmp_path / "in").glob("*.p*t*"), *(tmp_path / "in").glob("*.bin")]:
        pickle.unlink()
    after = load(tmp_path / "out")
    images = torch.rand(3, 3, 25, 19)
    assert torch.equal(before.score(images, PROMPTS), after.score(images, PROMPTS))
    assert after.spec.converted_from == before.spec.sha256 != after.spec.sha256 and before.spec.converted_from == ""
    # A calibration of the one is a calibration of the other.
    entry = measure(before.spec, [1.0, 2.0])
    assert find([entry], after.spec, "x") is entry
    files = list((tmp_path / "out").glob("*.safetensors"))
    assert len(files) == 1 and not list((tmp_path / "out").glob(".*"))
    with safe_open(files[0], "pt") as opened:
        header = opened.metadata()
    assert header["reward"] == reward and header["source_sha256"] == before.spec.sha256


def test_the_estimate_reads_the_new_file_too(tmp_path):
    source = write_image_reward(tmp_path / "in")
    convert(source, tmp_path / "out", "imagereward")
    shapes = []
    for folder in (source, tmp_path / "out"):
        reward, notes = skeleton_reward(RewardSettings(name="imagereward", path=str(folder)))
        assert notes == []
        shapes.append({name: value.shape for name, value in reward.state_dict().items()})
    assert shapes[0] == shapes[1]


def test_a_file_and_its_folder_are_the_same_source(tmp_path):
    source = write_image_reward(tmp_path)
    first = convert(source / "ImageReward.pt", tmp_path / "a", "imagereward")
    second = convert(source, tmp_path / "b", "imagereward")
    assert first.tensors == second.tensors and first.bytes == second.bytes
    assert first.copied == second.copied == ("med_config.json", "vocab.txt")
    digest = hashlib.sha256((source / "ImageReward.pt").read_bytes()).hexdigest()
    assert first.source_sha256 == digest


def test_the_other_version_is_still_known_after_converting(tmp_path, monkeypatch):
    source = write_hps(tmp_path / "in", hps.VERSIONS["hpsv2"].file)
    file = next(path for path in (tmp_path / "in").iterdir() if path.suffix == ".pt")
    md5 = hashlib.md5(file.read_bytes()).hexdigest()
    monkeypatch.setitem(hps.VERSIONS, "hpsv2", replace(hps.VERSIONS["hpsv2"], md5=md5))
    with pytest.raises(UserError, match=says("HPS_v2_compressed.pt", "hpsv2.1;", "reward.name=hpsv2")):
        convert(file, tmp_path / "out", "hpsv2.1")
    assert not (tmp_path / "out").exists()
    made = convert(source, tmp_path / "out", "hpsv2").weights
    with pytest.raises(UserError, match="is the published hpsv2, not hpsv2.1"):
        load_hps(made, "hpsv2.1", tokenizer=str(source))


def test_nothing_is_replaced_unless_asked(tmp_path):
    source = write_image_reward(tmp_path / "in")
    out = tmp_path / "out"
    out.mkdir()
    (out / "vocab.txt").write_text("mine")
    (out / "other.txt").write_text("mine too")
    with pytest.raises(UserError, match=says("vocab.txt'", "exists", "--force")):
        convert(source, out, "imagereward")
    assert sorted(path.name for path in out.iterdir()) == ["other.txt", "vocab.txt"]
    convert(source, out, "imagereward", force=True)
    assert (out / "other.txt").read_text() == "mine too" and (out / "vocab.txt").read_text() != "mine"
    with pytest.raises(UserError, match=says("in/med_config.json'", "another folder")):
        convert(source, source, "imagereward", force=True)
    assert (source / "med_config.json").read_text()


def test_what_breaks_off_leaves_nothing_half_written(tmp_path, monkeypatch):
    source = write_image_reward(tmp_path / "in")
    real = os.replace

    def full(temporary, target):
        if str(target).endswith(".safetensors"):
            raise OSError(28, "No space left on device")
        real(temporary, target)

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(UserError, match=says(tmp_path / "out", "No space left on device")):
        convert(source, tmp_path / "out", "imagereward")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["med_config.json", "vocab.txt"]


def test_bits_that_come_back_otherwise_are_noticed(tmp_path, monkeypatch):
    from safetensors.torch import load_file

    source = write_image_reward(tmp_path / "in")

    def rotten(path):
        tensors = load_file(path)
        next(iter(tensors.values())).view(-1)[0] += 1
        return tensors

    monkeypatch.setattr("rsaft_fast.rewards.convert.load_file", rotten)
    with pytest.raises(UserError, match=says("'blip.text_encoder.embeddings.position_ids'", "reads back")):
        convert(source, tmp_path / "out", "imagereward")
    assert not list((tmp_path / "out").glob("*.safetensors"))


def test_what_cannot_be_converted_is_one_clear_line(tmp_path, tower, capsys):
    class Trap:
        def __reduce__(self):
            return (open, (str(tmp_path / "executed"), "w"))

    trap = tmp_path / "trap"
    trap.mkdir()
    torch.save({"state_dict": Trap()}, trap / "HPS_v2.1_compressed.pt")
    blip = write_image_reward(tmp_path / "blip")
    alone = tmp_path / "alone"
    alone.mkdir()
    (alone / "ImageReward.pt").write_bytes((blip / "ImageReward.pt").read_bytes())
    short = tmp_path / "short.pth"
    short.write_bytes((blip / "ImageReward.pt").read_bytes()[:2000])
    file = tmp_path / "file"
    file.write_text("x")
    for source, folder, reward, words in [
        (trap, "out", "hpsv2.1", says(trap, "tensors", "code")),
        (blip / "ImageReward.pt", "out", "aesthetic", says("weight", "aesthetic predictor")),
        (blip / "ImageReward.pt", "out", "hpsv2", says("weight", "open_clip")),
        (alone, "out", "imagereward", says(alone, "med_config.json")),
        (short, "out", "aesthetic", says(short, "RuntimeError")),
        (tower, "out", "clip", says(tower, "safetensors")),
        (blip, "out", "ocr", says("ocr", "hpsv2, hpsv2.1, imagereward")),
        (blip, "file", "imagereward", says(tmp_path / "file", "folder")),
        (tmp_path / "absent", "out", "aesthetic", says(tmp_path / "absent", "file")),
    ]:
        assert main(["convert", str(source), str(tmp_path / folder), "--reward", reward]) == 2
        captured = capsys.readouterr()
        assert captured.out == "" and len(captured.err.strip().splitlines()) == 1 and words.search(captured.err), (
            captured
        )
    assert not (tmp_path / "executed").exists() and not (tmp_path / "out").exists()
