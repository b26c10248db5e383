"""Encodings on disk: the same bits, the text encoders left alone, and every change of what they depend on noticed."""

from __future__ import annotations

import gc
import json
import os
import shutil
import weakref
from pathlib import Path

import pytest
import torch
from builders.messages import says
from builders.recipes import PROMPTS, config
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from rsaft_fast.data import encodings
from rsaft_fast.data.encodings import DamagedEncodingError, EncodingCache, Watched, open_cache
from rsaft_fast.data.text_files import TextFiles
from rsaft_fast.errors import UserError
from rsaft_fast.recipe.config import Config
from rsaft_fast.train import loaders
from rsaft_fast.train.inputs import check_config
from rsaft_fast.train.loaders import FileLoaders
from rsaft_fast.train.logging import read_metrics
from rsaft_fast.train.loop import train
from rsaft_fast.train.trainer import Trainer

GUIDED = {"sampler": {"steps": 2, "guidance_scale": 3.0, "negative_prompt": "blurred"}}


@pytest.fixture
def cache(tmp_path) -> Path:
    return tmp_path / "encodings"


@pytest.fixture
def copy(tiny, tmp_path):
    """A pipeline of one's own, to be damaged."""
    return lambda family, name="pipeline": shutil.copytree(getattr(tiny, family), tmp_path / name)


def start(config: Config, log=lambda line: None) -> Trainer:
    return Trainer(config, check_config(config), log)


def files_of(cache: Path) -> list[Path]:
    return sorted(cache.glob("*/*.safetensors"))


def same_rows(one: Trainer, other: Trainer) -> None:
    assert set(one.encoded.rows) == set(other.encoded.rows)
    for text in one.encoded.rows:
        a, b = one.encoded.rows[text], other.encoded.rows[text]
        assert a.keys() == b.keys() and all(torch.equal(a[n], b[n]) and a[n].dtype == b[n].dtype for n in a)


def no_text_encoders(monkeypatch) -> None:
    monkeypatch.setattr(encodings, "load_text_encoders", lambda *args: pytest.fail("the text encoders were loaded"))


@pytest.mark.parametrize(
    ("family", "dtype"),
    [("sd15", "fp32"), ("sdxl", "bf16"), ("sd3", "fp16"), ("sd3", "fp32"), ("flux", "bf16"), ("zimage", "bf16")]
    + [("qwen", "bf16"), pytest.param("krea", "bf16", marks=pytest.mark.slow)],
)
def test_the_cache_changes_no_bit_and_is_enough(tiny, out, cache, family, dtype, monkeypatch):
    guided = GUIDED if family != "flux" else {"sampler": {"steps": 2, "guidance_scale": 3.5}}
    options = guided | {"backbone__dtype": dtype}
    without = start(config(tiny, out, family, data__encoding_cache=None, **options))
    assert not cache.exists()
    first = start(config(tiny, out, family, data__encoding_cache=str(cache), **options))
    assert len(files_of(cache)) == len(PROMPTS) + (family != "flux")
    no_text_encoders(monkeypatch)
    second = start(config(tiny, out, family, data__encoding_cache=str(cache), **options))
    for other in (first, second):
        same_rows(without, other)
    one, two = (t.encoded(PROMPTS) for t in (without, second))
    assert one.positive.keys() == two.positive.keys()
    assert all(torch.equal(one.positive[n], two.positive[n]) for n in one.positive)


def test_runs_with_and_without_text_encoders_are_one_run(tiny, copy, tmp_path, cache):
    """The weights of the text encoders are deleted between the runs, at last their folders too."""
    pipeline = copy("sd3")
    options = GUIDED | {"backbone__path": str(pipeline), "data__encoding_cache": str(cache)}
    runs = [tmp_path / f"run{index}" for index in range(3)]
    train(config(tiny, runs[0], "sd3", **options))
    for encoder in pipeline.glob("text_encoder*"):
        for file in encoder.glob("*.safetensors"):
            file.unlink()
    train(config(tiny, runs[1], "sd3", **options))
    for encoder in pipeline.glob("text_encoder*"):
        shutil.rmtree(encoder)
    train(config(tiny, runs[2], "sd3", **options))
    weights = [load_file(run / "checkpoints/step_2/weights.safetensors") for run in runs]
    assert all(torch.equal(weights[0][name], other[name]) for other in weights[1:] for name in weights[0])
    logs = [[{k: v for k, v in r.items() if k != "seconds"} for r in read_metrics(run)] for run in runs]
    assert logs[0] == logs[1] == logs[2]


@pytest.mark.parametrize("gone", ["weights", "folder"])
def test_a_missing_text_encoder_is_told_before_anything_is_loaded(tiny, out, copy, cache, gone, monkeypatch):
    pipeline = copy("sd3")
    options = {"backbone__path": str(pipeline), "data__encoding_cache": str(cache)}
    start(config(tiny, out, "sd3", data__batch_size=1, **options))  # 2 of the 4 prompts
    if gone == "folder":
        shutil.rmtree(pipeline / "text_encoder_3")
    else:
        (pipeline / "text_encoder_3/model.safetensors").unlink()
    for name in ("load_reward", "prepare_backbone"):
        monkeypatch.setattr(loaders, name, lambda *args, **options: pytest.fail("something was loaded"))
    no_text_encoders(monkeypatch)
    with pytest.raises(UserError) as caught:
        start(config(tiny, out, "sd3", **options))
    line = str(caught.value)
    assert "2 of 4" in line and "text_encoder_3" in line and str(cache) in line
    with pytest.raises(UserError, match=says("4 of 4", "data.encoding_cache", "null", "text_encoder_3")):
        start(config(tiny, out, "sd3", **options | {"data__encoding_cache": None}))


def test_a_bad_reward_ends_the_run_before_a_prompt_is_encoded(tiny, out, cache, monkeypatch):
    no_text_encoders(monkeypatch)
    monkeypatch.setattr(loaders, "prepare_backbone", lambda *args, **options: pytest.fail("it was loaded"))
    with pytest.raises(UserError, match=says("reward", "'/no/such/reward'")):
        start(config(tiny, out, data__encoding_cache=str(cache), reward__path="/no/such/reward"))


def change_a_weight(file: Path, keep_time: bool) -> None:
    """As fine-tuning does: every weight moves a little; the size stays, and perhaps the time."""
    before = file.stat()
    save_file({n: t * 1.001 for n, t in load_file(file).items()}, file, metadata={"format": "pt"})
    assert file.stat().st_size == before.st_size
    if keep_time:
        os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))


CHANGES = {
    "weights": lambda folder: change_a_weight(folder / "text_encoder_2/model.safetensors", keep_time=False),
    "weights, an old time": lambda folder: change_a_weight(folder / "text_encoder_3/model.safetensors", keep_time=True),
    "time": lambda folder: os.utime(folder / "text_encoder/model.safetensors"),
    "config": lambda folder: (folder / "text_encoder/config.json").write_text(
        json.dumps(json.loads((folder / "text_encoder/config.json").read_text()) | {"hidden_act": "gelu"})
    ),
    "tokenizer": lambda folder: (folder / "tokenizer/tokenizer_config.json").write_text(
        json.dumps(json.loads((folder / "tokenizer/tokenizer_config.json").read_text()) | {"pad_token": "!</w>"})
    ),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_text_encoder_misses_the_cache(tiny, out, copy, cache, change):
    pipeline = copy("sd3")
    options = {"backbone__path": str(pipeline), "data__encoding_cache": str(cache)}
    start(config(tiny, out, "sd3", **options))
    CHANGES[change](pipeline)
    again = start(config(tiny, out, "sd3", **options))
    assert len(files_of(cache)) == 2 * len(PROMPTS)
    same_rows(again, start(config(tiny, out, "sd3", **options | {"data__encoding_cache": None})))


def test_stale_encodings_are_not_taken_for_those_of_what_replaced_the_encoder(tiny, out, copy, cache):
    pipeline = copy("sd3")
    options = {"backbone__path": str(pipeline), "data__encoding_cache": str(cache)}
    start(config(tiny, out, "sd3", **options))
    CHANGES["config"](pipeline)
    (pipeline / "text_encoder/model.safetensors").unlink()
    with pytest.raises(UserError, match=says("4 of 4", "text_encoder;")):
        start(config(tiny, out, "sd3", **options))


@pytest.mark.parametrize(
    ("family", "change", "misses"),
    [
        ("sd15", {"backbone__dtype": "bf16"}, True),
        ("sd15", {"backbone__height": 48}, False),
        ("sdxl", {"backbone__height": 48}, False),
        ("flux", {"sampler": {"steps": 2, "guidance_scale": 2.0}}, False),
        ("sd15", {"parameters": {"train": "full"}}, False),
    ],
)
def test_what_an_encoding_depends_on_and_what_not(tiny, out, cache, family, change, misses):
    options = {"data__encoding_cache": str(cache)}
    start(config(tiny, out, family, **options))
    changed = start(config(tiny, out, family, **options, **change))
    assert len(files_of(cache)) == len(PROMPTS) * (2 if misses else 1)
    fresh = start(config(tiny, out, family, data__encoding_cache=None, **change))
    one, two = (run.encoded(PROMPTS).positive for run in (changed, fresh))
    assert one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


def test_a_copy_of_the_pipeline_shares_the_encodings(tiny, out, copy, cache, monkeypatch):
    start(config(tiny, out, "sd3", data__encoding_cache=str(cache)))
    no_text_encoders(monkeypatch)
    start(config(tiny, out, "sd3", data__encoding_cache=str(cache), backbone__path=str(copy("sd3"))))


DAMAGES = {
    "cut short": lambda content: content[:-1],
    "longer": lambda content: content + b"\0",
    "empty": lambda content: b"",
    "a bit turned": lambda content: content[:-3] + bytes([content[-3] ^ 1]) + content[-2:],
    "no safetensors": lambda content: b"\xff" * len(content),
    "header of zeros": lambda content: bytes(64) + content[64:],
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_file_is_encoded_again_aloud(tiny, out, cache, damage):
    settings_ = config(tiny, out, "sd3", data__encoding_cache=str(cache))
    whole = start(settings_)
    hurt = files_of(cache)[1]
    hurt.write_bytes(DAMAGES[damage](hurt.read_bytes()))
    said = []
    mended = start(settings_, said.append)
    assert said == [f"{hurt} is damaged: its prompt is encoded again"]
    same_rows(whole, mended)
    assert EncodingCache(cache).read(hurt.stem) is not None


def test_a_file_that_goes_while_a_run_goes_on_ends_it_with_a_way_out(tiny, out, cache):
    running = start(config(tiny, out, data__encoding_cache=str(cache)))
    running.update()
    for file in files_of(cache):
        file.unlink()
    with pytest.raises(UserError, match=says("'one'", "resume=auto")):
        running.update()
    with pytest.raises(KeyError):
        running.encoded.rows["never asked for"]


def test_an_interrupted_encoding_goes_on_where_it_was(tiny, out, cache, monkeypatch):
    settings_ = config(tiny, out, data__encoding_cache=str(cache))
    write, written = EncodingCache.write, []

    def interrupted(self, key, row):
        if len(written) == 2:
            raise KeyboardInterrupt
        written.append(key)
        write(self, key, row)

    monkeypatch.setattr(EncodingCache, "write", interrupted)
    with pytest.raises(KeyboardInterrupt):
        start(settings_)
    assert len(files_of(cache)) == 2
    monkeypatch.setattr(EncodingCache, "write", lambda self, key, row: (written.append(key), write(self, key, row)))
    start(settings_)
    assert len(written) == len(set(written)) == len(PROMPTS)


def test_a_full_disk_names_the_key_and_leaves_no_half_file(tiny, out, cache, monkeypatch):
    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("rsaft_fast.files.os.replace", full)
    with pytest.raises(UserError, match=says("data.encoding_cache", "No space left", "null")):
        start(config(tiny, out, data__encoding_cache=str(cache)))
    assert not [path for path in cache.rglob("*") if path.is_file()]


def test_a_folder_that_cannot_be_made(tmp_path, monkeypatch):
    file = tmp_path / "file"
    file.write_text("")
    with pytest.raises(UserError, match=says("data.encoding_cache", "Not a directory")):
        open_cache(str(file / "below"), print)
    said = []
    monkeypatch.setenv("XDG_CACHE_HOME", str(file))
    assert open_cache("auto", said.append) is None
    assert len(said) == 1 and "are not kept" in said[0] and "data.encoding_cache" in said[0]
    assert open_cache(None, print) is None
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "x"))
    assert open_cache("auto", print).folder == tmp_path / "x/rsaft_fast/encodings"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert open_cache("auto", print).folder == tmp_path / "home/.cache/rsaft_fast/encodings"


def test_without_a_home_encodings_are_not_kept_and_the_run_goes_on(monkeypatch):
    """A container's bare user id: no HOME, and no entry among the users."""
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.delenv("HOME")
    monkeypatch.setattr(os, "getuid", lambda: 123456789)
    said = []
    assert open_cache("auto", said.append) is None
    assert "not kept" in said[0] and "home" in said[0] and "data.encoding_cache" in said[0]
    with pytest.raises(UserError, match=says("data.encoding_cache", "/dev/null")):
        open_cache("/dev/null", print)


@settings(max_examples=30, deadline=None)
@given(
    st.dictionaries(st.text("abc_", min_size=1, max_size=4), st.lists(st.integers(0, 5), max_size=3), min_size=1),
    st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.float64]),
    st.integers(0, 2**32),
    st.data(),
)
def test_a_row_comes_back_as_it_was_and_no_byte_of_it_can_turn_unseen(tmp_path_factory, shapes, dtype, seed, data):
    generator = torch.Generator().manual_seed(seed)
    row = {name: torch.randn(1, *shape, generator=generator).to(dtype) for name, shape in shapes.items()}
    kept = EncodingCache(tmp_path_factory.mktemp("cache"))
    assert kept.read("0123") is None
    kept.write("0123", row)
    found = kept.read("0123")
    assert found.keys() == row.keys() and all(torch.equal(found[n], row[n]) for n in row)
    payload = sum(t.numel() * t.element_size() for t in row.values())
    if payload:
        content = bytearray(kept.path("0123").read_bytes())
        content[-1 - data.draw(st.integers(0, payload - 1))] ^= 1 << data.draw(st.integers(0, 7))
        kept.path("0123").write_bytes(content)
        with pytest.raises(DamagedEncodingError):
            kept.read("0123")


def test_a_pipeline_of_the_hub_is_its_commit(tmp_path, monkeypatch):
    index = tmp_path / "snapshots/0123abc/model_index.json"
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda *names: str(index))
    files = TextFiles("owner/name", tmp_path)
    assert files.identity() == {"hub": "owner/name@0123abc"} and files.without_weights() == []
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda *names: None)
    assert TextFiles("owner/name", tmp_path).identity() is None


def test_captions_of_the_denoising_loss_are_encoded_too(tiny, out, cache, tmp_path):
    from PIL import Image

    (tmp_path / "pictures").mkdir()
    Image.new("RGB", (40, 40)).save(tmp_path / "pictures/0.png")
    (tmp_path / "pictures/0.txt").write_text("a caption")
    run = start(config(tiny, out, data__encoding_cache=str(cache), denoising={"images": str(tmp_path / "pictures")}))
    assert {"a caption", ""} <= set(run.encoded.rows)
    run.update()


def test_prompts_that_the_reward_cuts_are_said_once(tiny, out, cache, tmp_path):
    (tmp_path / "long.txt").write_text(f"{'a red circle ' * 20}\nblue\n")
    said = []
    start(config(tiny, out, data__prompts=str(tmp_path / "long.txt"), data__encoding_cache=str(cache)), said.append)
    assert len([line for line in said if says("clip", 40, "tokens", "1 of ").search(line)]) == 1


def test_what_leaves_has_left_before_the_next_comes(tiny, out, monkeypatch):
    """Text encoders, then the reward, whose text tower goes, then the networks."""
    seen, encoders = [], []
    load_text, keep, prepare = encodings.load_text_encoders, FileLoaders.settle, loaders.prepare_backbone

    def loaded_text(*args):
        backbone = load_text(*args)
        assert backbone.denoiser.device.type == backbone.pipeline.vae.device.type == "meta"
        names = [name for name in backbone.text_encoder_names() if getattr(backbone.pipeline, name) is not None]
        encoders.extend(weakref.ref(getattr(backbone.pipeline, name)) for name in names)
        seen.append("text encoders")
        return backbone

    def kept(self, reward, prompts):
        assert len(encoders) == 3 and all(encoder() is None for encoder in encoders)
        tower = weakref.ref(reward.model.text_model)
        reward = keep(self, reward, prompts)
        assert tower() is None and not reward.has_text_tower
        seen.append("reward")
        return reward

    def prepared(*args, **options):
        gc.collect()
        seen.append("networks")
        return prepare(*args, **options)

    monkeypatch.setattr(encodings, "load_text_encoders", loaded_text)
    monkeypatch.setattr(FileLoaders, "settle", kept)
    monkeypatch.setattr(loaders, "prepare_backbone", prepared)
    run = start(config(tiny, out, "sd3", data__encoding_cache=None, samples={"every": 1, "count": 6}))
    assert seen == ["text encoders", "reward", "networks"]
    assert run.backbone.pipeline.text_encoder is run.backbone.pipeline.text_encoder_3 is None
    assert run.backbone.pipeline.tokenizer is not None
    grid = run.sample()
    assert grid.device.type == "cpu" and run.reward.score(grid, run.sample_prompts).shape == (6,)


def test_watched_prompts_are_a_list_that_counts(capsys):
    watched = Watched(PROMPTS, "prompts")
    assert list(watched) == list(watched) == list(PROMPTS) == watched
    assert len(watched) == len(PROMPTS) and watched[1] == PROMPTS[1]
    assert capsys.readouterr().err == ""  # no bar for moments


@pytest.mark.parametrize("samples", [{"every": 0}, {"every": 1, "count": 2}])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_reward_too_coarse_for_the_radius_is_refused_before_the_first_update(tiny, out, dtype, samples):
    options = {"reward__dtype": dtype, "samples": samples, "sharpness": None}
    with pytest.raises(UserError, match=rf"in {dtype} the S1 .* at radius 0.001 .* set reward.dtype=fp32"):
        train(config(tiny, out, smoothing={"image": {"radius": 1e-3}}, **options))
    assert not out.exists()
    with pytest.raises(UserError, match="at radius 0.001 .*reward.dtype=fp32"):
        train(config(tiny, out, smoothing=None, **options | {"sharpness": {"radius": 1e-3}}))
    with pytest.raises(UserError, match="at radius 0.0001 .*reward.dtype=fp32"):
        train(config(tiny, out, smoothing={"image": {"radius": 1e-4, "space": "reward_input"}}, **options))


@pytest.mark.parametrize(
    "options",
    [
        {"smoothing": {"image": {"radius": 4.0}}, "sharpness": {"radius": 4.0}},
        {"smoothing": None, "sharpness": None},
        {"smoothing": {"image": {"space": "latent"}}, "sharpness": None},
    ],
)
def test_a_coarse_reward_will_do_where_no_small_radius_is_at_stake(tiny, out, options):
    assert train(config(tiny, out, reward__dtype="bfloat16", **options)).step == 2


def test_float32_rewards_are_not_compared(tiny, out, monkeypatch):
    monkeypatch.setattr("rsaft_fast.smoothing.precision.s1_error", lambda *args: pytest.fail("compared"))
    train(config(tiny, out, smoothing={"image": {"radius": 1e-6}}))
