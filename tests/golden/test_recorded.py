"""A few runs still give the figures that they gave before the trainer was taken apart; `record.py` has all of them.

The last bits differ between processors and versions of torch, so that figures are compared and not hashes.
"""

import json
from pathlib import Path

import pytest
from builders.recipes import write_tiny
from golden.record import cases, run

EXPECTED = json.loads((Path(__file__).parent / "expected.json").read_text())


@pytest.fixture(scope="module")
def recipes(tmp_path_factory):
    return dict(cases(write_tiny(tmp_path_factory.mktemp("tiny"))))


@pytest.mark.parametrize("name", EXPECTED)
def test_a_run_gives_the_recorded_figures(recipes, tmp_path, name):
    metrics = run(recipes[name], tmp_path / "run")["metrics"]
    assert len(metrics) == len(EXPECTED[name])
    for found, expected in zip(metrics, EXPECTED[name]):
        assert found.keys() == expected.keys()
        # |g2 - g1| / |g1| and its like are small differences; everything is far from what another algorithm gives.
        assert {k: v for k, v in found.items() if v is not None} == pytest.approx(
            {k: v for k, v in expected.items() if v is not None}, rel=5e-3, abs=1e-6
        )
