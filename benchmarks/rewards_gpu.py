"""Time and peak memory of reward models with the gradient to their pictures: random weights at the published size.

python benchmarks/rewards_gpu.py --results benchmarks/results

CLIP ViT-H/14 (HPSv2, PickScore) without its text tower, and ImageReward's BLIP-L; batches of 1, 8 and 32 pictures of
1024x1024, as they leave a decoder. Each row is in <gpu>/rewards.json as soon as it is measured. `--device cpu --tiny`
runs the same code where there is no GPU.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import BlipVisionConfig

from rsaft_fast.benchmarks.bandwidth import bandwidths
from rsaft_fast.benchmarks.random_models import random_reward
from rsaft_fast.benchmarks.results import describe_machine, file_name
from rsaft_fast.benchmarks.timing import Part, Timer
from rsaft_fast.errors import UserError
from rsaft_fast.estimate.live import LiveBytes
from rsaft_fast.estimate.skeleton import quiet
from rsaft_fast.files import write_atomically
from rsaft_fast.recipe.check import check_device
from rsaft_fast.rewards import Preprocess, Reward, RewardSettings, RewardSpec
from rsaft_fast.rewards.clip import published_clip
from rsaft_fast.rewards.heads import AffineHead
from rsaft_fast.rewards.image_reward import PUBLISHED_TEXT, PUBLISHED_VISION, BlipScorer, ImageReward, text_config
from rsaft_fast.rewards.text import LengthTokenizer

Row = dict[str, Any]
NAME = "rewards.json"
BATCHES, SIDE = (1, 8, 32), 1024
PROMPT = "a red circle"
# (dtype, checkpointed): as training runs it, what checkpointing costs, and what S1 and small radii need.
MODES = (("bfloat16", True), ("bfloat16", False), ("float32", True))
_TINY_LAYERS = {"num_hidden_layers": 2, "num_attention_heads": 2}
_TINY = {"hidden_size": 16, "intermediate_size": 32, **_TINY_LAYERS}


@dataclass(frozen=True)
class Sizes:
    """What is measured: pictures a side, and changes to the published configs."""

    side: int = SIDE
    changed: dict[str, int] | None = None


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; 0, or 2 when the input is wrong."""
    parser = argparse.ArgumentParser(
        prog="rewards_gpu.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--results", default="benchmarks/results", metavar="FOLDER", help=f"gets <gpu>/{NAME}")
    parser.add_argument("--device", default="cuda", help="default: cuda")
    parser.add_argument("--tiny", action="store_true", help="tiny models: to see that everything runs")
    parser.add_argument("--repeats", type=int, default=20, help="timed calls of each row (default: 20)")
    arguments = parser.parse_args(argv)
    try:
        check_device(arguments.device)
        file = measure(arguments.results, torch.device(arguments.device), arguments.tiny, arguments.repeats)
    except UserError as error:
        print(f"rewards_gpu.py: {error}", file=sys.stderr)
        return 2
    print(f"rewards_gpu.py: {file}")
    return 0


def measure(results: str | Path, device: torch.device, tiny: bool = False, repeats: int = 20) -> Path:
    """Measure every row and write the file.

    Raises:
        UserError: the folder cannot be written to.
    """
    head = describe_machine(device) | {"side": 40 if tiny else SIDE, "tiny": tiny}
    # In a section of its own: with it at the top, this file would pass for the optimizer suite's.
    head["bandwidth"] = bandwidths(Timer(device))
    file = Path(results) / file_name(head["gpu"]) / NAME
    sizes = Sizes(head["side"], _TINY if tiny else None)
    rows: list[Row] = []
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        for row in _rows(sizes, device, repeats):
            rows.append(row)
            write_atomically(file, json.dumps(head | {"rows": rows}, indent=1) + "\n")
            print(describe(row), flush=True)
    except OSError as error:
        raise UserError(f"--results {results} cannot be written to ({error.strerror}); give another") from error
    return file


def _rows(sizes: Sizes, device: torch.device, repeats: int) -> Iterator[Row]:
    for (name, build), (dtype, checkpoint) in itertools.product(BUILDERS.items(), MODES):
        reward = build(sizes, device, dtype, checkpoint)
        # As the trainer does once its prompts are known: CLIP's text tower goes.
        reward.keep_prompts([PROMPT])
        for batch in BATCHES:
            yield {"reward": name, "dtype": dtype, "checkpoint": checkpoint, "batch": batch} | _measure(
                reward, batch, sizes.side, device, repeats
            )
        del reward
        if device.type == "cuda":
            torch.cuda.empty_cache()


def _measure(reward: Reward, batch: int, side: int, device: torch.device, repeats: int) -> Row:
    """Milliseconds of a scoring with gradient; bytes at its peak, and those that stand before: weights and pictures."""
    prompts = [PROMPT] * batch
    try:
        images = torch.rand(batch, 3, side, side, device=device, requires_grad=True)

        def run() -> torch.Tensor:
            return torch.autograd.grad(reward.score(images, prompts).sum(), images)[0]

        run()
        with _peak(device, [*reward.parameters(), images]) as found:
            run()
        times = Timer(device).alternate({"gradient": Part(run)}, repeats, seconds=30.0)
    except torch.OutOfMemoryError as error:
        return {"missing": str(error).split("\n", 1)[0]}
    return found | times["gradient"].row()


@contextmanager
def _peak(device: torch.device, standing: Sequence[torch.Tensor]) -> Iterator[Row]:
    """Fills in `peak` and `standing` in bytes: torch's counters on a GPU, the storages of the CPU one by one."""
    found: Row = {}
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        found["standing"] = torch.cuda.memory_allocated(device)
        yield found
        torch.cuda.synchronize(device)
        found["peak"] = torch.cuda.max_memory_allocated(device)
        return
    with LiveBytes("cpu") as live:
        found["standing"] = live.see(standing)
        yield found
    found["peak"] = live.peak


def describe(row: Row) -> str:
    """One line for the terminal."""
    what = f"{row['reward']} x{row['batch']} {row['dtype']}{' checkpointed' if row['checkpoint'] else ''}"
    if "missing" in row:
        return f"{what}: {row['missing']}"
    return f"{what}: {row['ms_p50']:.1f} ms, {row['peak'] / 2**30:.2f} GiB at the peak"


def _clip_h(sizes: Sizes, device: torch.device, dtype: str, checkpoint: bool) -> Reward:
    config = dict(published_clip("hpsv2.1"))
    if sizes.changed:
        vision = config["vision_config"] | sizes.changed | {"image_size": 28}
        config |= {"vision_config": vision, "text_config": config["text_config"] | sizes.changed}
    settings = RewardSettings(name="hpsv2.1", path="xswu/HPSv2", dtype=dtype, checkpoint=checkpoint)
    return random_reward(settings, config, device)


def _blip_l(sizes: Sizes, device: torch.device, dtype: str, checkpoint: bool) -> Reward:
    changed = sizes.changed or {}
    vision = BlipVisionConfig(**PUBLISHED_VISION | changed | ({"image_size": 32} if changed else {}))
    text = text_config(PUBLISHED_TEXT | changed, vision.hidden_size)
    with quiet(), torch.device(device):
        model, head = BlipScorer(vision, text), AffineHead(text.hidden_size)
    prepare = Preprocess((vision.image_size, vision.image_size), "shortest_crop")
    options = {"dtype": getattr(torch, dtype), "checkpoint": checkpoint}
    spec = RewardSpec("imagereward", "random weights")
    return ImageReward(model, head, LengthTokenizer(35), prepare, spec, **options).to(device)


BUILDERS: dict[str, Callable[[Sizes, torch.device, str, bool], Reward]] = {"clip-h": _clip_h, "blip-l": _blip_l}


if __name__ == "__main__":
    sys.exit(main())
