"""The page holds all that it shows, whatever is in the run, and stays small."""

from __future__ import annotations

import base64
import io
import json
import random
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from builders.messages import says
from builders.recipes import config
from builders.run_folders import PROMPTS, write_run
from PIL import Image

from rsaft_fast.cli import main
from rsaft_fast.figures.grids import cut_grid
from rsaft_fast.report import page as page_module
from rsaft_fast.report.page import report_of, write_run_report
from rsaft_fast.report.pictures import gallery
from rsaft_fast.report.sources import find_runs
from rsaft_fast.train.logging import read_metrics
from rsaft_fast.train.loop import train

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results" / "playground" / "experiment"


class Parsed(HTMLParser):
    """Elements of a page with their attributes, and the text of scripts by id."""

    def __init__(self, text: str):
        super().__init__()
        self.elements: list[tuple[str, dict]] = []
        self.scripts: dict[str, str] = {}
        self.text = ""
        self._script = None
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        self._script = dict(attrs).get("id", "") if tag == "script" else None

    def handle_endtag(self, tag):
        self._script = None

    def handle_data(self, data):
        if self._script is None:
            self.text += data
        else:
            self.scripts[self._script] = self.scripts.get(self._script, "") + data

    def all(self, tag: str) -> list[dict]:
        return [attributes for name, attributes in self.elements if name == tag]


def values(steps, seed=0):
    draw = random.Random(seed)
    return {
        step: {
            name: draw.random() for name in ("reward", "reward_se", "held_out/<i>x", "held_out/<i>x_se", "image/dark")
        }
        for step in steps
    }


def test_a_page_loads_nothing_and_no_text_of_a_run_becomes_markup(tmp_path):
    for name in ("<b>one", "two & three"):
        write_run(
            tmp_path / name,
            [random.random() for _ in range(31)],
            values([0, 10, 30]),
            [0, 10, 30],
            [(10, "<script>w", "</script>t")],
            odd=[float("nan")] * 31,
        )
    sources = find_runs([str(tmp_path)])
    text = report_of(sources, "title </title><script>")
    parsed = Parsed(text)
    assert not {"b", "i"} & {tag for tag, _ in parsed.elements}
    assert [a for tag, a in parsed.elements if "src" in a and not a["src"].startswith("data:image/")] == []
    assert all(a["href"].startswith("#") for tag, a in parsed.elements if "href" in a) and not parsed.all("link")
    ids = [a["id"] for _, a in parsed.elements if "id" in a]
    assert len(set(ids)) == len(ids) and {a["href"][1:] for a in parsed.all("a")} <= set(ids)
    for words in (
        "<b>one",
        "two & three",
        "<script>w",
        "</script>t",
        *PROMPTS,
        "<i>x (held out)",
        "seed: 3",
        "torch 2.99",
    ):
        assert words in parsed.text, words
    assert all(image["alt"] for image in parsed.all("img"))
    data = json.loads(parsed.scripts["chart-data"])
    plots = {a["data-chart"]: a["aria-label"] for a in parsed.all("div") if a.get("class") == "plot"}
    assert plots.keys() == data.keys() and all("from" in label for label in plots.values())
    (held,) = [chart for chart in data.values() if chart["title"] == "Held out: <i>x"]
    assert [line["label"] for line in held["lines"]] == ["<b>one", "two & three"]
    assert held["lines"][0]["y"] == pytest.approx(list(sources[0].evaluated("held_out/<i>x").values), rel=1e-5)
    # Phases of 3 and 1 seconds.
    assert "75 %" in parsed.text and "25 %" in parsed.text


def test_pictures_of_every_step_are_those_of_the_grids(tmp_path):
    run = write_run(tmp_path / "run", [1.0], grids=[0, 4, 9], shape=(32, 24))
    found = gallery({"run": {step: run / "samples" / f"step_{step}.png" for step in (0, 4, 9)}})
    assert found.steps == [0, 4, 9] and found.pixelated and found.size == (24, 32) and found.left_out == 0
    assert {label: list(own) for label, own in found.columns.items()} == {"before": [0], "run": [4, 9]}
    cut = cut_grid(Image.open(run / "samples" / "step_9.png"))
    for row, address in enumerate(found.columns["run"][9]):
        shown = Image.open(io.BytesIO(base64.b64decode(address.partition(",")[2])))
        assert np.array_equal(np.asarray(shown), np.asarray(cut.columns["after 9 updates"][row]))


@pytest.mark.parametrize("count", [4, 24])
def test_many_large_grids_fit_the_budget_and_the_last_is_shown(tmp_path, count):
    run = write_run(tmp_path / "run", [1.0], grids=[0, 7], shape=(512, 384))
    grids = {0: run / "samples" / "step_0.png"} | {n: run / "samples" / "step_7.png" for n in range(1, count)}
    budget = 2**18
    found = gallery({"run": grids, "again": grids}, budget)
    assert sum(len(one) for own in found.columns.values() for step in own.values() for one in step) <= budget
    assert found.steps[0] == 0 and found.steps[-1] == count - 1 and len(found.steps) + found.left_out == count
    assert found.size[0] / found.size[1] == pytest.approx(384 / 512, rel=0.01)
    assert (count == 24) == bool(found.left_out)


def test_grids_that_say_nothing_of_their_pictures_are_left_out(tmp_path):
    run = write_run(tmp_path / "run", [1.0])
    Image.new("RGB", (300, 200)).save(run / "samples" / "step_0.png")
    (run / "samples" / "step_5.png").write_bytes(b"\x89PNG\r\n\x1a\nhalf")
    assert gallery({"run": {n: run / "samples" / f"step_{n}.png" for n in (0, 5)}}) is None
    assert "Trained reward" in report_of(find_runs([str(run)]), "t")


def test_a_run_ends_with_its_page_and_one_that_cannot_be_written_ends_no_run(tiny, out, monkeypatch):
    said = []
    grids = {"every": 1, "count": 2}
    outcome = train(config(tiny, out, samples=grids), report=write_run_report)
    assert any(str(out / "report.html") in line for line in outcome.further)
    assert any("rsaft-fast ab before after" in line for line in outcome.further)
    parsed = Parsed((out / "report.html").read_text())
    assert "sampling" in parsed.text and "torch " in parsed.text and len(parsed.all("img")) == 2 * 2 + 1
    assert json.loads((out / "run.json").read_text())["seconds"]["sampling"] > 0
    records = [{k: v for k, v in record.items() if k != "seconds"} for record in read_metrics(out)]

    monkeypatch.setattr(page_module, "report_of", lambda *arguments: 1 / 0)
    outcome = train(config(tiny, out.with_name("b"), samples=grids), log=said.append, report=write_run_report)
    assert outcome.step == 2 and outcome.export is not None and not (out.with_name("b") / "report.html").exists()
    assert sum(bool(says("warning", "ZeroDivisionError").search(line)) for line in said) == 1
    train(config(tiny, out.with_name("c"), report=False), report=lambda folder: pytest.fail("written"))
    others = [{k: v for k, v in r.items() if k != "seconds"} for r in read_metrics(out.with_name("b"))]
    assert records == others


def test_the_command_shows_a_run_runs_and_an_experiment(tmp_path, capsys):
    for seed, name in enumerate(("a", "b")):
        write_run(tmp_path / name, [0.1, 0.2], values([0, 2], seed), [0, 2], seed=seed)
    assert main(["report", str(tmp_path / "a")]) == 0 and (tmp_path / "a" / "report.html").is_file()
    assert main(["report", str(tmp_path / "a"), str(tmp_path / "b"), "-o", str(tmp_path / "new" / "both.html")]) == 0
    assert str(tmp_path / "new" / "both.html") in capsys.readouterr().out
    assert main(["compare", str(tmp_path), "-o", str(tmp_path / "c")]) == 0
    assert Image.open(tmp_path / "c" / "comparison.png").width > 800 and (tmp_path / "c" / "report.html").is_file()
    assert "x (held out)" in capsys.readouterr().out
    assert main(["compare", str(tmp_path / "a"), "-o", str(tmp_path / "d")]) == 2
    assert says("compare", "2", "rsaft-fast report").search(capsys.readouterr().err)
    assert main(["report", str(tmp_path / "a"), "-o", str(tmp_path)]) == 2
    assert says("--output", "folder").search(capsys.readouterr().err)
    assert main(["ab", str(tmp_path / "a"), "-o", str(tmp_path / "ab.html")]) == 2
    assert says("ab", "2", "--read").search(capsys.readouterr().err)
    assert main(["ab", str(tmp_path / "a"), str(tmp_path / "b"), "-o", str(tmp_path / "ab.html")]) == 0
    if not RESULTS.is_dir():
        pytest.skip("no results of an experiment beside the tests")
    assert main(["report", str(RESULTS), "-o", str(tmp_path / "e.html")]) == 0
    data = json.loads(Parsed((tmp_path / "e.html").read_text()).scripts["chart-data"])
    assert any(chart["y"] == "r*" and chart["x"] == "proxy reward" for chart in data.values())
