"""A finished run's file: what comes back, and whose it is."""

from __future__ import annotations

import json
import math

import pytest
from builders.experiment_runs import evaluation, finish
from builders.messages import says

from rsaft_fast.errors import UserError
from rsaft_fast.experiments import records
from rsaft_fast.experiments.records import identity_of, is_done, read_record, unit_of, write_record
from rsaft_fast.experiments.row import Row

ROW = Row("core", "brittle", "draft", "plain", 3, 20, 10, 6, ("smoothing=null",), (0.5,))


def changed(**fields) -> Row:
    return Row(**vars(ROW) | fields)


def test_means_come_back_as_they_were_and_pictures_to_half_a_unit(tmp_path):
    made = [evaluation(step, 0.41234567, 3.3333, pictures=6) for step in (0, 10, 20)]
    write_record(ROW.path(tmp_path), ROW, [*made, evaluation(20, 0.5, 1.0, scale=0.5, pictures=6)], {"whole": 12.34})
    run = read_record(ROW.path(tmp_path))
    assert (run.proxy, run.method, run.variant, run.seed) == ("brittle", "draft", "plain", 3)
    assert [p.step for p in run.points] == [0, 10, 20] and [p.scale for p in run.scaled] == [0.5]
    for point, own in zip(run.points, made):
        assert point.truth == pytest.approx(0.41234567, rel=2e-6) and point.proxy == pytest.approx(3.3333, rel=2e-6)
        kept = {"r*", "proxy", "S1@0.3"}
        assert point.pictures.keys() == kept and point.means.keys() == own.values.keys()
        for name, values in ((name, own.values[name]) for name in kept):
            for found, wanted in zip(point.pictures[name], values.tolist()):
                both = math.isnan(found) and math.isnan(wanted)
                assert both or abs(found - wanted) <= unit_of(name) / 2 * (1 + 1e-9), name
    text = ROW.path(tmp_path).read_text()
    ROW.path(tmp_path).write_text(text.replace('"watched":{},', ""))  # as files were before monitors
    assert read_record(ROW.path(tmp_path)).points[0].watched == {} and '"watched":{},' in text
    # Relations of pictures that state none are no part of their mean.
    assert math.isnan(own.values["relation"][0]) and not math.isnan(run.points[0].means["relation"])


def test_what_held_out_gradients_said_comes_back(tmp_path):
    said = [{"step": 1, "agreement/judge": -0.25, "agreement_error/judge": 0.125}, {"step": 11, "image_radius": 0.3}]
    write_record(ROW.path(tmp_path), ROW, [evaluation(0, 0.4, 4.0)], {}, said)
    assert read_record(ROW.path(tmp_path)).steered == tuple(said)
    write_record(ROW.path(tmp_path), ROW, [evaluation(0, 0.4, 4.0)], {})
    assert read_record(ROW.path(tmp_path)).steered == () and "steered" not in ROW.path(tmp_path).read_text()


def test_a_file_of_usual_size_is_small(tmp_path):
    write_record(ROW.path(tmp_path), ROW, [evaluation(n, 0.4, 4.0, pictures=256) for n in range(5)], {})
    numbers = 5 * 256 * 3
    assert ROW.path(tmp_path).stat().st_size < 5 * numbers


def test_what_a_result_follows_from_is_its_identity(tmp_path, monkeypatch):
    finish(ROW, tmp_path, [0.4, 0.5, 0.3], [0, 2, 4])
    assert is_done(ROW, tmp_path) and not is_done(changed(seed=4), tmp_path)
    others = (
        changed(updates=30),
        changed(overrides=("smoothing.image=null",)),
        changed(scales=()),
        changed(pictures=7),
    )
    for other in others:
        assert other.path(tmp_path) == ROW.path(tmp_path) and not is_done(other, tmp_path)
    content = json.loads(ROW.path(tmp_path).read_text())
    assert content["row"]["overrides"] == ["smoothing=null"] and content["made_with"]["torch"]
    # Another reward on the side changes nothing; the one that is trained on does, and so does the pipeline.
    names = ("brittle", "fair")
    paths = [str(records.playground.reward_path(name)) for name in names] + [str(records.playground.pipeline_path())]
    real = {path: records._assets_hash(path) for path in paths}
    for path, matters in zip(paths, (True, False, True)):
        monkeypatch.setattr(records, "_assets_hash", lambda p, path=path: "x" if p == path else real[p])
        assert is_done(ROW, tmp_path) is not matters
    monkeypatch.undo()
    judged = changed(overrides=("reward.path=playground/fair",))
    before = identity_of(judged)
    monkeypatch.setattr(records, "_assets_hash", lambda p: "x" if p == paths[1] else real[p])
    assert identity_of(judged) != before


@pytest.mark.parametrize("text", ["", "[]", '{"format": 1}', '{"format": 1, "row": 3, "units": {}, "evaluations": []}'])
def test_what_is_no_result_is_refused_and_not_done(tmp_path, text):
    path = ROW.path(tmp_path)
    path.parent.mkdir()
    path.write_text(text)
    assert not is_done(ROW, tmp_path)
    with pytest.raises(UserError, match=says(str(path))):
        read_record(path)
