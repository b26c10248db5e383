"""Time and peak memory of reward models with the gradient to their pictures: random weights at the published size.

python benchmarks/rewards_gpu.py --results benchmarks/results

CLIP ViT-H/14 (HPSv2, PickScore) without its text tower, and ImageReward's BLIP-L; batches of 1, 8 and 32 pictures of
1024x1024, as they leave a decoder. Each row is in <gpu>/rewards.json as soon as it is measured. `--device cpu --tiny`
runs the same code where there is no GPU.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Callable, Sequence

import torch
from transformers import BlipVisionConfig

from rsaft_fast.benchmarks.bandwidth import bandwidths
from rsaft_fast.benchmarks.meter import measure
from rsaft_fast.benchmarks.random_models import random_reward
from rsaft_fast.benchmarks.results import Results, Row, describe_machine
from rsaft_fast.benchmarks.timing import Part, Timer
from rsaft_fast.data.encodings import free_memory
from rsaft_fast.dtypes import DTYPES
from rsaft_fast.errors import UserError
from rsaft_fast.estimate.skeleton import quiet
from rsaft_fast.recipe.check import check_device
from rsaft_fast.rewards import Preprocess, Reward, RewardSettings, RewardSpec
from rsaft_fast.rewards.clip import published_clip
from rsaft_fast.rewards.heads import AffineHead
from rsaft_fast.rewards.image_reward import PUBLISHED_TEXT, PUBLISHED_VISION, BlipScorer, ImageReward, text_config
from rsaft_fast.rewards.text import LengthTokenizer

NAME = "rewards.json"
BATCHES, SIDE, TINY_SIDE = (1, 8, 32), 1024, 40
PROMPT = "a red circle"
# (dtype, checkpointed): as training runs it, what checkpointing costs, and what S1 and small radii need.
MODES = (("bf16", True), ("bf16", False), ("fp32", True))
_TINY = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}


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
        device, side = torch.device(arguments.device), TINY_SIDE if arguments.tiny else SIDE
        head = describe_machine(device) | bandwidths(Timer(device)) | {"side": side, "tiny": arguments.tiny}
        results = Results("rewards", head, arguments.results, NAME)
    except UserError as error:
        print(f"rewards_gpu.py: {error}", file=sys.stderr)
        return 2
    for (name, build), (dtype, checkpoint) in itertools.product(BUILDERS.items(), MODES):
        reward = build(_TINY if arguments.tiny else {}, device, dtype, checkpoint)
        # As the trainer does once its prompts are known: CLIP's text tower goes.
        reward.keep_prompts([PROMPT])
        for batch in BATCHES:
            what = {"reward": name, "dtype": dtype, "checkpoint": checkpoint, "batch": batch}
            row = results.put(what | measured(reward, batch, side, device, arguments.repeats))
            print(describe(row), flush=True)
        del reward
        free_memory(device)
    print(f"rewards_gpu.py: {results.path}")
    return 0


def measured(reward: Reward, batch: int, side: int, device: torch.device, repeats: int) -> Row:
    """Milliseconds of a scoring with gradient; bytes at its peak, and those that stand before: weights and pictures."""
    try:
        images = torch.rand(batch, 3, side, side, device=device, requires_grad=True)

        def run() -> torch.Tensor:
            return torch.autograd.grad(reward.score(images, [PROMPT] * batch).sum(), images)[0]

        run()
        found = measure(device, run, lambda: [*reward.parameters(), images])
        times = Timer(device).alternate({"gradient": Part(run)}, repeats, seconds=30.0)
    except torch.OutOfMemoryError as error:
        return {"missing": str(error).split("\n", 1)[0]}
    return {"standing": found.standing, "peak": found.peak} | times["gradient"].row()


def describe(row: Row) -> str:
    """One line for the terminal."""
    what = f"{row['reward']} x{row['batch']} {row['dtype']}{' checkpointed' if row['checkpoint'] else ''}"
    if "missing" in row:
        return f"{what}: {row['missing']}"
    return f"{what}: {row['ms_p50']:.1f} ms, {row['peak'] / 2**30:.2f} GiB at the peak"


def _clip_h(changed: Row, device: torch.device, dtype: str, checkpoint: bool) -> Reward:
    """`changed`: keys of the published configs that make the model small."""
    config = dict(published_clip("hpsv2.1"))
    vision = config["vision_config"] | changed | ({"image_size": 28} if changed else {})
    config |= {"vision_config": vision, "text_config": config["text_config"] | changed}
    settings = RewardSettings(name="hpsv2.1", path="xswu/HPSv2", dtype=dtype, checkpoint=checkpoint)
    return random_reward(settings, config, device)


def _blip_l(changed: Row, device: torch.device, dtype: str, checkpoint: bool) -> Reward:
    vision = BlipVisionConfig(**PUBLISHED_VISION | changed | ({"image_size": 32} if changed else {}))
    text = text_config(PUBLISHED_TEXT | changed, vision.hidden_size)
    with quiet(), torch.device(device):
        model, head = BlipScorer(vision, text), AffineHead(text.hidden_size)
    prepare = Preprocess((vision.image_size, vision.image_size), "shortest_crop")
    options = {"dtype": DTYPES[dtype], "checkpoint": checkpoint}
    spec = RewardSpec("imagereward", "random weights")
    return ImageReward(model, head, LengthTokenizer(35), prepare, spec, **options).to(device)


BUILDERS: dict[str, Callable[[Row, torch.device, str, bool], Reward]] = {"clip-h": _clip_h, "blip-l": _blip_l}


if __name__ == "__main__":
    sys.exit(main())
