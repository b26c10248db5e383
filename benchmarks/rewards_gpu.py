"""Time and peak memory of reward models with the gradient to their pictures: random weights at the published size.

python benchmarks/rewards_gpu.py --results benchmarks/results

CLIP ViT-H/14 (HPSv2, PickScore) without its text tower, and ImageReward's BLIP-L; batches of 1, 8 and 32 pictures of
1024x1024, as they leave a decoder. Each row is in <gpu>/rewards.json as soon as it is measured.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Sequence

import torch

from rsaft_fast.benchmarks.bandwidth import bandwidths
from rsaft_fast.benchmarks.memory_measure import measure
from rsaft_fast.benchmarks.random_models import random_reward
from rsaft_fast.benchmarks.results import Results, Row, describe_machine
from rsaft_fast.benchmarks.tables import gib
from rsaft_fast.benchmarks.timing import Part, Timer
from rsaft_fast.data.encodings import free_memory
from rsaft_fast.errors import UserError, first_line
from rsaft_fast.recipe.check import check_device
from rsaft_fast.rewards import Reward, RewardSettings

NAME = "rewards.json"
REWARDS = {"clip-h": "hpsv2.1", "blip-l": "imagereward"}
BATCHES, SIDE, PROMPT = (1, 8, 32), 1024, "a red circle"
# (dtype, checkpointed): as training runs it, what checkpointing costs, and what S1 and small radii need.
MODES = (("bf16", True), ("bf16", False), ("fp32", True))


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; 0, or 2 when the input is wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", default="benchmarks/results", metavar="FOLDER", help=f"gets <gpu>/{NAME}")
    parser.add_argument("--device", default="cuda", help="default: cuda")
    parser.add_argument("--repeats", type=int, default=20, help="timed calls of each row (default: 20)")
    arguments = parser.parse_args(argv)
    try:
        check_device(arguments.device)
        device = torch.device(arguments.device)
        head = describe_machine(device) | bandwidths(Timer(device)) | {"side": SIDE}
        results = Results("rewards", head, arguments.results, NAME)
    except UserError as error:
        print(f"rewards_gpu.py: {error}", file=sys.stderr)
        return 2
    for (name, family), (dtype, checkpoint) in itertools.product(REWARDS.items(), MODES):
        reward = random_reward(RewardSettings(name=family, dtype=dtype, checkpoint=checkpoint), device)
        reward.keep_prompts([PROMPT])  # as the trainer does once its prompts are known: CLIP's text tower goes
        for batch in BATCHES:
            what = {"reward": name, "dtype": dtype, "checkpoint": checkpoint, "batch": batch}
            row = results.put(what | measured(reward, batch, device, arguments.repeats))
            said = row.get("missing") or f"{row['ms_p50']:.1f} ms, {gib(row['peak'])} GiB at the peak"
            print(f"{name} x{batch} {dtype}{' checkpointed' if checkpoint else ''}: {said}", flush=True)
        del reward
        free_memory(device)
    print(f"rewards_gpu.py: {results.path}")
    return 0


def measured(reward: Reward, batch: int, device: torch.device, repeats: int) -> Row:
    """Milliseconds of a scoring with gradient; bytes at its peak, and those that stand before: weights and pictures."""
    try:
        images = torch.rand(batch, 3, SIDE, SIDE, device=device, requires_grad=True)

        def run() -> torch.Tensor:
            return torch.autograd.grad(reward.score(images, [PROMPT] * batch).sum(), images)[0]

        run()
        found = measure(device, run, lambda: [*reward.parameters(), images])
        times = Timer(device).times(Part(run), repeats, seconds=30.0)
        return {name: found[name] for name in ("standing", "peak")} | times.row()
    except torch.OutOfMemoryError as error:
        return {"missing": first_line(error)}


if __name__ == "__main__":
    sys.exit(main())
