"""On a real device: the timer's events, counted launches and bytes, and every provider that is installed."""

import pytest
import torch

from rsaft_fast.benchmarks.bandwidth import bandwidths
from rsaft_fast.benchmarks.providers import OURS
from rsaft_fast.benchmarks.results import describe_machine
from rsaft_fast.benchmarks.suite import Job, Suite, device_here, plan, start
from rsaft_fast.benchmarks.timing import Part, Timer, extra_bytes, launches

pytestmark = pytest.mark.gpu


def test_events_see_the_device_and_not_the_host():
    import time

    device = device_here()
    source = torch.rand(1 << 26, device=device)
    target = torch.empty_like(source)
    copy = Part(lambda: target.copy_(source))
    slow_host = Part(lambda: (target.copy_(source), time.sleep(2e-3)))
    quick, slow = (Timer(device).times(part, repeats=10).row() for part in (copy, slow_host))
    # Half a gigabyte in 20 us would be 26 TB/s: faster than any card.
    assert 0.02 < quick["ms_p50"] and slow["host_ms"] >= 2
    assert quick["host_ms"] < 1


def test_launches_and_bytes_are_counted():
    device = device_here()
    x = torch.rand(1 << 20, device=device)
    y = torch.empty_like(x)
    pinned = torch.rand(16).pin_memory()
    small = torch.empty(16, device=device)
    part = Part(lambda: (torch.neg(x, out=y), torch.abs(x, out=y), small.copy_(pinned, non_blocking=True)))
    assert launches(part, device) == {"launches": 2, "copies": 1}
    assert extra_bytes(part, device) == 0
    assert extra_bytes(Part(lambda: x + 1), device) == x.nbytes


def test_the_card_is_described():
    device = device_here()
    head = describe_machine(device)
    assert head["driver"] and head["cuda"] and "note" not in head
    rates = bandwidths(Timer(device))
    assert 0.5 < rates["read_gbps"] / rates["copy_gbps"] < 2
    assert "a Triton kernel" in rates["read_ways"]


@pytest.mark.parametrize("layout", ["fp32", "bf16", "8bit"])
def test_ours_runs_beside_every_installed_peer(layout, tmp_path):
    timer, results = start(device_here(), str(tmp_path))
    run = Suite(timer, results, repeats=3)
    names = next(job.providers for job in plan(timer.device, ["tiny"], [layout]))
    rows = run.run(Job("tiny", layout, names))
    assert run.failed == []
    updates = {row["provider"]: row for row in rows if row["what"] == "update" and "missing" not in row}
    assert set(updates) & set(OURS)
    for name in set(updates) & {"ours-cuda", "ours-triton"}:
        assert updates[name]["launches"] <= (8 if layout == "8bit" else 6), "8-bit lists have small tensors apart"
        assert updates[name]["copies"] == 0, "nothing moved, nothing is uploaded"
