"""Run folders written by hand: what a run leaves, without training one."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from rsaft_fast.figures.grids import save_grid

PROMPTS = ("a red circle", 'a "quoted" <b>cat</b>, & a dog', "</script><script>alert(1)</script>")


def write_run(
    folder: Path,
    rewards: Sequence[float],
    evaluations: Mapping[int, Mapping[str, float]] = {},
    grids: Sequence[int] = (),
    alarms: Sequence[tuple[int, str, str]] = (),
    shape: tuple[int, int] = (32, 32),
    seed: int = 0,
    **more: Sequence[float],
) -> Path:
    """A run of `len(rewards)` updates; `more` are further figures of metrics.jsonl, one an update."""
    (folder / "samples").mkdir(parents=True)
    (folder / "config.yaml").write_text("seed: 3\noutput_dir: somewhere\n")
    series = {"reward": rewards, **{name.replace("__", "/"): values for name, values in more.items()}}
    with (folder / "metrics.jsonl").open("w") as stream:
        for index in range(len(rewards)):
            record = {"step": index + 1} | {name: values[index] for name, values in series.items()}
            stream.write(json.dumps(record) + "\n")
    if evaluations:
        with (folder / "evaluations.jsonl").open("w") as stream:
            for step, values in evaluations.items():
                told = [{"step": at, "what": what, "text": text} for at, what, text in alarms if at == step]
                stream.write(json.dumps({"step": step, "values": values, "alarms": told}) + "\n")
    generator = torch.Generator().manual_seed(seed)
    before = pictures(shape, generator)
    for step in grids:
        columns = {"before": before} | ({f"after {step} updates": pictures(shape, generator)} if step else {})
        save_grid(folder / "samples" / f"step_{step}.png", PROMPTS, columns)
    (folder / "run.json").write_text(
        json.dumps({"software": {"torch": "2.99"}, "device": "a toaster", "seconds": {"sampling": 3.0, "working": 1.0}})
    )
    return folder


def pictures(shape: tuple[int, int], generator: torch.Generator) -> torch.Tensor:
    """Smooth random pictures with some noise, as photographs are, one for each of `PROMPTS`."""
    coarse = torch.rand(len(PROMPTS), 3, 9, 9, generator=generator)
    smooth = torch.nn.functional.interpolate(coarse, shape, mode="bicubic", align_corners=False)
    return (smooth + 0.02 * torch.randn(smooth.shape, generator=generator)).clamp(0, 1)
