"""Time by phase: all of it is somewhere, the outermost phase has it, and sittings of a run add up."""

from __future__ import annotations

import json
import time

import pytest
import torch

from rsaft_fast.phases import DECODER, REST, SAMPLING, SCORING, phase
from rsaft_fast.train.meter import Meter, RunFacts, read_facts

CPU = torch.device("cpu")


def spend(seconds: float) -> None:
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        pass


def test_time_goes_to_the_outermost_phase_and_none_is_lost(tmp_path):
    meter = Meter(CPU, {"torch": "2.99"})
    began = time.perf_counter()
    with meter.running():
        with phase(SAMPLING):
            spend(0.05)
            with phase(SCORING):
                spend(0.02)
        with phase(DECODER):
            spend(0.03)
        spend(0.01)
        for _ in range(1500):  # more marks than are kept
            with phase(SCORING):
                pass
    total = time.perf_counter() - began
    meter.write(tmp_path / "run.json", resumed=False)
    facts = read_facts(tmp_path / "run.json")
    assert facts.seconds.keys() == {SAMPLING, DECODER, SCORING, REST}
    assert facts.seconds[SAMPLING] >= 0.07 and facts.seconds[DECODER] >= 0.03
    assert sum(facts.seconds.values()) == pytest.approx(total, rel=0.2, abs=0.02)
    assert facts.software == {"torch": "2.99"} and facts.device and facts.peak > 2**20


@pytest.mark.parametrize(("resumed", "seconds"), [(True, 7.0), (False, 0.0)])
def test_a_resumed_run_adds_to_its_earlier_sittings_and_a_new_one_does_not(tmp_path, resumed, seconds):
    path = tmp_path / "run.json"
    path.write_text(json.dumps({"seconds": {SAMPLING: 7.0}, "peak": 2**50, "peaks": {}}))
    meter = Meter(CPU, {})
    with meter.running(), phase(SAMPLING):
        spend(0.01)
    meter.write(path, resumed)
    facts = read_facts(path)
    assert seconds < facts.seconds[SAMPLING] < seconds + 5 and (facts.peak == 2**50) == resumed


@pytest.mark.parametrize("content", ["", "[1]", '{"seconds": {"sampling": "x"}}', '{"seconds": 3}', "\0"])
def test_facts_that_are_none_are_empty(tmp_path, content):
    (tmp_path / "run.json").write_text(content)
    assert read_facts(tmp_path / "run.json") == RunFacts() == read_facts(tmp_path / "nothing.json")
