"""The figures to reach, each computed from a run's rows: what was wanted, what was measured, whether it was met."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from rsaft_fast.benchmarks.floors import floor, image_floor
from rsaft_fast.benchmarks.host import what_of
from rsaft_fast.benchmarks.images import EAGER, WHAT, case_name
from rsaft_fast.benchmarks.problem import DTYPES
from rsaft_fast.benchmarks.results import Row, is_gpu
from rsaft_fast.benchmarks.tables import View, align, markdown

SDXL, SD35, FLUX = "sdxl-full", "sd35-medium-full", "flux1-full"
LORA = ("sd15-lora32", "sdxl-lora32", "sd35-medium-lora32", "flux1-lora32")
LAUNCH_BOUND_MS = 0.040  # below this a few launches and their tails are the time, whatever the bytes
BIG_BATCH, SMALL_BATCH = case_name(32, 1024), case_name(4, 512)
_HEADER = ("goal", "wanted", "measured", "met")
STATE_BYTES = {"bf16": 12}  # what AdamW holds a parameter without SAM: fp32 moments and master


@dataclass(frozen=True)
class Goal:
    """One line of the table.

    Attributes:
        what: which pass, list and layout. wanted: the bound, in words. measured: the value, or why there is none.
        met: None where it was not measured.
    """

    what: str
    wanted: str
    measured: str
    met: bool | None


def goals(results: Row) -> list[Goal]:
    """Every goal, measured or not."""
    view = View(results)
    parts = (_norm, _passes, _update, _lora, _low_bit, _images, _memory, _accuracy, _host)
    return [goal for part in parts for goal in part(view)]


def text(results: Row) -> str:
    """The goals as a table for the terminal."""
    return lines(goals(results), _note(results))


def as_markdown(results: Row) -> str:
    """The goals as a Markdown table."""
    return markdown_lines(goals(results), _note(results))


def lines(found: list[Goal], note: str = "") -> str:
    """Goals as a table for the terminal, and how many are met; `note` says why they may not count."""
    rows = [_HEADER, *((g.what, g.wanted, g.measured, _word(g.met)) for g in found)]
    return "\n".join([*align(rows, words=4), "", _summary(found, note)])


def markdown_lines(found: list[Goal], note: str = "") -> str:
    """The same in Markdown."""
    rows = [(g.what, g.wanted, g.measured, _word(g.met)) for g in found]
    return markdown(_HEADER, rows) + f"\n\n{_summary(found, note)}"


def _note(results: Row) -> str:
    return "" if is_gpu(results) else str(results.get("note", ""))


def _summary(found: list[Goal], note: str) -> str:
    met, measured = sum(g.met is True for g in found), sum(g.met is not None for g in found)
    said = f"{met} of {measured} measured goals met; {len(found) - measured} not measured"
    return f"{said}. {note}" if note else said


def _word(met: bool | None) -> str:
    return "-" if met is None else "yes" if met else "no"


def _at_least(what: str, value: float | None, bound: float, unit: str) -> Goal:
    return _goal(what, value, f">= {bound:.0%} of {unit}", lambda v: f"{v:.1%}", lambda v: v >= bound)


def _at_most(what: str, value: float | None, bound: float, unit: str) -> Goal:
    return _goal(what, value, f"<= {bound:g} x {unit}", lambda v: f"{v:.3f} x", lambda v: v <= bound)


def _goal(
    what: str, value: float | None, wanted: str, said: Callable[[float], str], holds: Callable[[float], bool]
) -> Goal:
    if value is None:
        return Goal(what, wanted, "not measured", None)
    return Goal(what, wanted, said(value), holds(value))


def _fraction(row: Row | None, of: str = "fraction_of_copy") -> float | None:
    return None if row is None else row[of]


def _over(row: Row | None, other: Row | None) -> float | None:
    return None if row is None or other is None else row["ms_p50"] / other["ms_p50"]


def _floor_ms(view: View, what: str, row: Row) -> float:
    return floor(what, row["dtype"]) * row["parameters"] / view.results["copy_gbps"] / 1e6


def _norm(view: View) -> Iterator[Goal]:
    for dtype in ("bf16", "fp32"):
        ours, what = view.ours("norm", SDXL, dtype), f"global norm, {SDXL}, {dtype}"
        yield _at_least(what, _fraction(ours, "fraction_of_read"), 0.95, "the card's read bandwidth")
        total_norm = view.get("norm", SDXL, dtype, "foreach")
        yield _at_most(what, _over(ours, total_norm), 0.7, "get_total_norm(foreach=True)")


def _passes(view: View) -> Iterator[Goal]:
    for dtype in ("fp32", "bf16"):
        ours = view.ours("perturb", SDXL, dtype)
        yield _at_least(f"perturb, {SDXL}, {dtype}", _fraction(ours), 0.93, "copy bandwidth")
    for dtype in ("fp32", "bf16"):
        ours, what = view.ours("step", SDXL, dtype), f"restore + AdamW, {SDXL}, {dtype}"
        yield _at_least(what, _fraction(ours), 0.92, "copy bandwidth")
        alone = view.get("step", SDXL, dtype, "adamw-alone")
        yield _at_most(what, _over(ours, alone), 1.0, "torch fused AdamW alone")


def _update(view: View) -> Iterator[Goal]:
    ours, what = view.ours("update", SDXL, "fp32"), f"whole update with clipping, {SDXL}, fp32"
    usual = view.get("update", SDXL, "fp32", "usual-fused")
    yield _at_most(what, _over(ours, usual), 0.60, "the usual SAM loop + clip + torch fused AdamW")
    for dtype in ("fp32", "bf16"):
        ours, what = view.ours("update", SDXL, dtype), f"whole update with clipping, {SDXL}, {dtype}"
        value = None if ours is None else ours["ms_p50"] / _floor_ms(view, "update", ours)
        yield _at_most(what, value, 1.08, f"its floor of {floor('update', dtype):.4g} bytes at copy bandwidth")


def _lora(view: View) -> Iterator[Goal]:
    for case in LORA:
        ours, what = view.ours("update", case, "fp32"), f"whole update, {case}, fp32"
        launched = None if ours is None or ours.get("launches") is None else ours
        wanted = "<= 6 kernels and 2 table copies"
        if launched is None:
            yield Goal(what, wanted, "not measured", None)
        else:
            kernels, copies = launched["launches"], launched["copies"]
            yield Goal(what, wanted, f"{kernels} kernels, {copies} copies", kernels <= 6 and copies <= 2)
        value = None if ours is None else ours["ms_p50"] / max(_floor_ms(view, "update", ours), LAUNCH_BOUND_MS)
        yield _at_most(what, value, 1.3, "max(its floor, 40 us)")


def _low_bit(view: View) -> Iterator[Goal]:
    # FLUX's list with its gradients takes 96 GB: a goal on the cards that have them.
    for case in (SDXL, SD35, FLUX):
        ours, what = view.ours("update", case, "8bit"), f"whole update, {case}, 8bit"
        if case == FLUX and ours is None:
            continue
        yield _at_least(what, _fraction(ours), 0.85, f"copy bandwidth on {floor('update', '8bit'):.4g} bytes")
        peer = view.get("update", case, "8bit", "bitsandbytes")
        yield _at_most(what, _over(ours, peer), 0.7, "the usual SAM loop + bitsandbytes AdamW8bit")


def _images(view: View) -> Iterator[Goal]:
    for dtype in ("fp32", "bf16"):
        itemsize = DTYPES[dtype].itemsize
        ours, what = view.ours(WHAT, BIG_BATCH, dtype), f"image perturbation, {BIG_BATCH}, {dtype}"
        for kind, reads in (("", 2), (" (stretch: g from L2)", 1)):
            bytes_ = image_floor(itemsize, reads)
            at_copy = None if ours is None else bytes_ * ours["parameters"] / view.results["copy_gbps"] / 1e6
            value = None if ours is None else ours["ms_p50"] / at_copy
            yield _at_most(what + kind, value, 1.15, f"{bytes_} bytes an element at copy bandwidth")
    for case in (BIG_BATCH, SMALL_BATCH):
        for dtype in ("fp32", "bf16"):
            faster = _over(view.get(WHAT, case, dtype, EAGER), view.ours(WHAT, case, dtype))
            what = f"image perturbation, {case}, {dtype}"
            yield _goal(what, faster, ">= 1.5 x faster than eager torch", lambda v: f"{v:.2f} x", lambda v: v >= 1.5)


def _memory(view: View) -> Iterator[Goal]:
    ours, what = view.ours("update", SDXL, "bf16"), f"memory of SAM over AdamW, {SDXL}, bf16"
    value = None
    if ours is not None and ours.get("held_bytes") is not None:
        beyond = ours["held_bytes"] + ours["extra_bytes"] - STATE_BYTES["bf16"] * ours["parameters"]
        value = beyond / ours["parameters"]
    # Tables, slots of the sums and the allocator's rounding come to a few thousandths of a byte.
    wanted = "0 bytes a parameter with a master"
    yield _goal(what, value, wanted, lambda v: f"{v:.3f} bytes a parameter", lambda v: v <= 0.02)
    elsewhere = "not in this file: benchmarks/gpu_memory.py"
    yield Goal("memory of SAM over AdamW with release", "0 bytes a parameter", elsewhere, None)


def _accuracy(view: View) -> Iterator[Goal]:
    wanted = "norm within 1e-7 of float64 at 2.6e9 elements"
    yield Goal("accuracy", wanted, "not in this file: pytest -m gpu", None)


def _host(view: View) -> Iterator[Goal]:
    for case in LORA:
        for variant, a_tensor in (("static", 0.0), ("checked", 0.3)):
            row = view.ours(what_of(variant), case, "fp32")
            wanted = "<= 60 us" + (f" + {a_tensor} us a tensor a pass" if a_tensor else "")
            bound = 60 + 2 * a_tensor * (row["tensors"] if row else 0)
            wanted += f" = {bound:.0f} us" if row and a_tensor else ""
            us = None if row is None else 1e3 * row["ms_p50"]
            what = f"host time of an update, {case}, {variant} gradients"
            yield _goal(what, us, wanted, lambda v: f"{v:.1f} us", lambda v, bound=bound: v <= bound)
