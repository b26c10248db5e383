"""The published sets by name: from a path, from the hub's cache, without a network; and what is said about them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from builders.messages import says
from builders.recipes import config

from rsaft_fast.cli import main
from rsaft_fast.data.prompt_sets import HPDV2_STYLES, SETS, overlap_note, prompt_notes
from rsaft_fast.data.prompts import load_prompts
from rsaft_fast.errors import UserError
from rsaft_fast.train.inputs import check_config

PROMPTS = {style: [f"{style} {i}" for i in range(3)] for style in HPDV2_STYLES}


def hpdv2(folder: Path) -> Path:
    """The layout of the published repository."""
    (folder / "benchmark").mkdir(parents=True)
    for style, prompts in PROMPTS.items():
        (folder / "benchmark" / f"{style}.json").write_text(json.dumps(prompts))
    return folder


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """A hub cache as huggingface_hub lays it out, and no network."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)

    def dataset(hub_id: str) -> Path:
        place = tmp_path / "hub" / f"datasets--{hub_id.replace('/', '--')}"
        (place / "refs").mkdir(parents=True)
        (place / "refs" / "main").write_text("a" * 40)
        (place / "snapshots" / ("a" * 40)).mkdir(parents=True)
        return place / "snapshots" / ("a" * 40)

    return dataset


def test_styles_by_themselves_and_together_in_the_published_order(tmp_path, cache):
    everything = [prompt for style in HPDV2_STYLES for prompt in PROMPTS[style]]
    folder = hpdv2(tmp_path / "copy")
    assert load_prompts(f"hpdv2={folder}") == everything
    assert load_prompts(f"hpdv2={folder}/benchmark") == everything
    assert load_prompts(f"hpdv2-paintings={folder}") == PROMPTS["paintings"]
    assert load_prompts(f"hpdv2-photo={folder}/benchmark/photo.json") == PROMPTS["photo"]
    hpdv2(cache("zhwang/HPDv2"))
    assert load_prompts("hpdv2") == everything
    assert load_prompts("hpdv2-anime") == PROMPTS["anime"]


def test_every_set_reads_its_published_columns(tmp_path, cache):
    quoted = 'a sign that says "Hello, World"'
    parti = cache("nateraw/parti-prompts")
    (parti / "PartiPrompts.tsv").write_text(f"Prompt\tCategory\tChallenge\tNote\n{quoted}\tAbstract\tBasic\tx\n")
    (cache("sayakpaul/drawbench") / "prompts.csv").write_text("Prompts,Category\nA red car.,Colors\n")
    assert load_prompts("partiprompts") == [quoted]
    assert load_prompts("drawbench") == ["A red car."]
    task = {"tag": "counting", "include": [{"class": "cow", "count": 2}], "prompt": "a photo of two cows"}
    (tmp_path / "evaluation_metadata.jsonl").write_text(json.dumps(task) + "\n")
    assert load_prompts(f"geneval={tmp_path}") == [task["prompt"]]
    (tmp_path / "test.txt").write_text(quoted + "\n")
    assert load_prompts(f"ocr={tmp_path}") == [quoted]


def test_sets_of_later_benchmarks_read_their_published_layouts(tmp_path, cache):
    rated = {"prompt": "a cow", "image_path": ["1.jpg"], "rank": [1], "raw_annotation": []}
    (cache("zhwang/HPDv2") / "test.json").write_text(json.dumps([rated]))
    assert load_prompts("hpdv2-400") == ["a cow"]
    task = {"prompt": "four cows", "atom_count": 2, "vqa_list": [["How many?", "four"]], "skills": ["count"]}
    (tmp_path / "geneval2_data.jsonl").write_text(json.dumps(task) + "\n")
    assert load_prompts(f"geneval2={tmp_path}") == ["four cows"]
    (tmp_path / "data").mkdir()
    row = '7,"A fox, and a hen","{""Testpoints"": [""Style""]}"\n'
    (tmp_path / "data" / "test_prompts_en.csv").write_text("index,prompt_en,sub_dims_en\n" + row)
    assert load_prompts(f"unigenbench={tmp_path}") == ["A fox, and a hen"]
    prompts = tmp_path / "ELLA" / "dpg_bench" / "prompts"
    prompts.mkdir(parents=True)
    for name, text in (("10", "ten\nof a kind\n"), ("2", "two"), ("COCO_1", "a street")):
        (prompts / f"{name}.txt").write_text(text)
    for place in (tmp_path / "ELLA", prompts):
        assert load_prompts(f"dpg-bench={place}") == ["two", "ten\nof a kind", "a street"]
    (prompts / "2.txt").write_text(" \n")
    with pytest.raises(UserError, match=says("2.txt", "empty")):
        load_prompts(f"dpg-bench={prompts}")
    (tmp_path / "all.jsonl").write_text('"one"\n"two"\n')
    assert load_prompts(f"dpg-bench={tmp_path}/all.jsonl") == ["one", "two"]


def test_parquet(tmp_path, cache, monkeypatch):
    arrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    file = cache("yuvalkirstain/pickapic_v1_no_images") / "data" / "test_unique-00000-of-00001-73a51cbb6488571d.parquet"
    file.parent.mkdir()
    parquet.write_table(arrow.table({"label_0": [1.0, 0.0], "caption": ["a cat", "ein Mädchen"]}), file)
    assert load_prompts("pickapic") == ["a cat", "ein Mädchen"]
    with pytest.raises(UserError, match=says("'prompt'", "'label_0'", "'caption'")):
        load_prompts(f"pickapic={file}", column="prompt")
    parquet.write_table(arrow.Table.from_arrays([arrow.array(["a"]), arrow.array(["b"])], ["text", "text"]), file)
    with pytest.raises(UserError, match=says("2 columns", "'text', 'text'")):
        load_prompts(f"pickapic={file}")
    parquet.write_table(arrow.table({"text": [["a"], ["b"]]}), file)
    with pytest.raises(UserError, match=says("row 1", "list", "string")):
        load_prompts(f"pickapic={file}")
    monkeypatch.setattr("rsaft_fast.data.prompts.MAX_ROWS", 1)
    with pytest.raises(UserError, match=says("rows", 2, 1)):
        load_prompts(f"pickapic={file}")
    file.write_bytes(b"PAR1 and no more")
    with pytest.raises(UserError, match="Parquet magic bytes"):
        load_prompts(f"pickapic={file}")


def test_parquet_without_pyarrow(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
    (tmp_path / "a.parquet").write_bytes(b"")
    with pytest.raises(UserError, match="pip install pyarrow"):
        load_prompts(tmp_path / "a.parquet")


@pytest.mark.parametrize("name", SETS)
def test_without_a_network_it_says_what_to_download_from_where(name, cache):
    with pytest.raises(UserError) as caught:
        load_prompts(name)
    text = str(caught.value)
    assert "\n" not in text and f"give {name}=PATH" in text
    assert (SETS[name].hub or SETS[name].home) in text and all(file in text for file in SETS[name].files)


def test_what_is_not_there_is_one_clear_line(tmp_path, cache):
    (tmp_path / "two").mkdir()
    for name in ("a.csv", "b.csv"):
        (tmp_path / "two" / name).write_text("prompt\nx\n")
    (tmp_path / "benchmark").mkdir()
    hub = cache("zhwang/HPDv2")
    hpdv2(hub)
    (hub / "benchmark" / "anime.json").unlink()
    for source, words in [
        (f"hpdv2={tmp_path}", says(tmp_path, 0, "benchmark/anime.json, benchmark/concept")),
        ("hpdv2", says(0, "benchmark/anime.json")),
        (f"ocr={tmp_path}/none", says("none", "dataset/ocr/test.txt", "github.com/yifan123/flow_grpo")),
        (f"drawbench={tmp_path}/two", says("two", "a.csv, b.csv", "drawbench=FILE")),
        (f"drawbench={tmp_path}/benchmark", says(tmp_path / "benchmark", "none")),
        ("drawbnech", says("drawbnech", "drawbench?")),
        ("drawbnech=x.txt", says("drawbnech", "drawbench")),
    ]:
        with pytest.raises(UserError) as caught:
            load_prompts(source)
        assert words.search(str(caught.value)) and "\n" not in str(caught.value), caught.value


def test_a_file_whose_name_holds_an_equals_sign_is_a_file(tmp_path):
    (tmp_path / "a=b.txt").write_text("x\n")
    assert load_prompts(tmp_path / "a=b.txt") == ["x"]


def test_a_copy_that_is_not_whole_and_a_set_that_leaks_are_noted():
    whole = [str(i) for i in range(800)]
    assert prompt_notes("hpdv2-anime=x.json", whole) == prompt_notes("my.txt", whole, training=True) == []
    (note,) = prompt_notes("hpdv2-photo=x.json", whole[:750])
    assert says(750, 800).search(note)
    (note,) = prompt_notes("hpdv2-photo", whole, training=True)
    assert "comparable" in note and "other three styles" in note
    (note,) = prompt_notes("hpdv2-anime", whole, training=True)
    assert "other three styles" not in note


def test_overlap_counts_different_prompts_whatever_their_case_and_spacing():
    training = ["A red  circle", "two squares", "two squares"]
    assert overlap_note(training, ["a red circle", "a RED circle ", "three"], "the grid").startswith("1 of the 2 ")
    assert overlap_note(training, ["a red circle!"], "the grid") is None


def test_a_run_says_what_is_both_trained_on_and_looked_at(tiny, out, tmp_path):
    copy = tmp_path / "photo.json"
    copy.write_text(json.dumps(["a red circle", "x", "y"]))
    recipe = {"data__prompts": f"hpdv2-photo={copy}", "samples__every": 1}
    other = tmp_path / "other.txt"
    other.write_text("A red circle\nsomething else\n")
    notes = check_config(config(tiny, out, **recipe, samples__prompts=str(other))).notes
    assert ["3 prompts", "not be comparable", "1 of the 2"] == [
        next(words for words in ("3 prompts", "not be comparable", "1 of the 2") if words in note) for note in notes
    ]
    assert not any("of the 2" in note for note in check_config(config(tiny, out, **recipe)).notes)
    assert check_config(config(tiny, out)).notes == []


def test_score_takes_a_set_too(tiny, tmp_path, capsys):
    from PIL import Image

    (tmp_path / "in").mkdir()
    for name in "ab":
        Image.new("RGB", (8, 8)).save(tmp_path / "in" / f"{name}.png")
    (tmp_path / "tasks.jsonl").write_text('{"tag": "x", "prompt": "a cow"}\n{"tag": "y", "prompt": "two cows"}\n')
    arguments = ["score", tmp_path / "in", "--prompts", f"geneval={tmp_path / 'tasks.jsonl'}", "--device", "cpu"]
    arguments += ["--reward", f"clip={tiny.clip}", "--output", tmp_path / "scores.csv"]
    assert main([str(argument) for argument in arguments]) == 0
    assert says(2, 553).search(capsys.readouterr().out)
    assert [line.split(",")[1] for line in (tmp_path / "scores.csv").read_text().splitlines()] == [
        "prompt",
        "a cow",
        "two cows",
    ]
