"""Full parameters in shards: the run of one process, on several that hold a part of the weights each."""

from __future__ import annotations

import json
import os
import random
import signal
import time

import pytest
import torch
import torch.distributed as dist
from builders.clip import write_clip
from builders.many import (
    CASES,
    REWARD_GRADIENT,
    SHARD,
    checkpoint,
    compared,
    distance,
    largest_difference,
    made,
    records,
    same_run,
    wide,
)
from builders.messages import says
from builders.pipelines import tiny_flux2_dev
from builders.ranks import Ranks, command, trained
from builders.recipes import config, recipe, write_recipe
from safetensors.torch import load_file

from rsaft_fast.distributed import launch
from rsaft_fast.distributed.launch import Place, launched
from rsaft_fast.distributed.shards import local
from rsaft_fast.errors import UserError
from rsaft_fast.recipe.check_several import check_several
from rsaft_fast.train import checkpoint as checkpoints
from rsaft_fast.train.loop import train

# Three micro-batches of an update in one process; of two ranks each has one that is not full.
UNEVEN = SHARD | {"data__accumulate": 3, "optimizer": {"lr": 1e-3, "max_grad_norm": 0.02}, "ema": {"decay": 0.9}}
UNEVEN |= {"keep_checkpoints": None, "samples": {"every": 5, "count": 3}, "checkpoint_every": 1}


def test_a_run_in_shards_is_that_of_one_and_goes_on_in_one(tiny, aux, tmp_path):
    one, many = tmp_path / "one", tmp_path / "many"
    trained(1, tmp_path, made(tiny, aux, one, "draft", **(UNEVEN | {"max_steps": 2})))
    trained(2, tmp_path / "logs", made(tiny, aux, many, "draft", **(UNEVEN | {"max_steps": 1})))
    assert (one / "samples/step_0.png").read_bytes() == (many / "samples/step_0.png").read_bytes()
    for before, after in zip(records(one), records(many), strict=False):
        for name in before.keys() - {"seconds"}:
            assert after[name] == pytest.approx(before[name], rel=2e-3, abs=1e-5), (before["step"], name)
    assert largest_difference(one, many, 1) < 1e-6
    saved = checkpoint(many, 1)
    exported = load_file(next((many / "transformer").glob("*.safetensors")))
    assert exported.keys() - saved.weights.keys() == {"pos_embed.pos_embed"}  # a buffer
    assert all(torch.equal(exported[name], mean) for name, mean in saved.copies["mean"].items())
    assert json.loads((many / "transformer/config.json").read_text())["_class_name"] == "SD3Transformer2DModel"
    trained(1, tmp_path, made(tiny, aux, many, "draft", **(UNEVEN | {"max_steps": 2, "resume": "auto"})))
    assert largest_difference(one, many, 2) < 1e-6
    part = next((many / "checkpoints/step_1/shards").glob("__1_*"))
    part.write_bytes(part.read_bytes()[:-8] + b"otherend")
    assert part.name in checkpoints.find_fault(many / "checkpoints/step_1")


@pytest.mark.slow
@pytest.mark.parametrize("count", [2, 4])
@pytest.mark.parametrize("case", [case for case in CASES if "bi_lora" not in case])  # which is LoRA's
def test_shards_make_the_run_of_one(tiny, aux, tmp_path, case, count):
    compared(tiny, aux, tmp_path, case, [count], **SHARD)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "checkpoint"),
    [(family, kept) for family in ("sd15", "sdxl", "flux") for kept in (["denoiser", "decoder"], [])]
    + [(family, ["denoiser", "decoder"]) for family in ("klein", "flux2-dev", "zimage", "qwen", "krea")],
)
def test_every_architecture_is_parted_by_its_blocks(tiny, tmp_path, family, checkpoint):
    """With and without recomputed activations, whose second forward pass finds the weights gathered."""
    keys = REWARD_GRADIENT | SHARD | {"method": {"name": "draft"}, "max_steps": 2, "checkpoint_every": 2}
    keys |= {"sampler": {"steps": 2, "guidance_scale": 2.0}, "backbone__checkpoint": checkpoint}
    if family == "flux2-dev":
        family, keys["backbone__path"] = "klein", str(tiny_flux2_dev(tmp_path / "dev"))
    for count, folder in ((1, tmp_path / "one"), (2, tmp_path / "two")):
        trained(count, tmp_path / f"logs {count}", config(tiny, folder, family, **keys))
    # Products of gathered weights round otherwise in some shapes (one level in 25 of 613,320 values of klein),
    # and Adam's first steps enlarge what is left of gradients near zero: 2.5e-6 of Qwen-Image's weights. The ball
    # enlarges it too: Krea-2's gradients agree to 4.5e-7 of their norm without smoothing, to 3e-4 with it.
    # Which shapes depends on the processor: SDXL's pictures are off by a level on one.
    close = {"sd15": 1e-6, "sdxl": 1e-6, "flux": 1e-6, "krea": 3e-5}.get(family, 5e-6)
    levels = 0 if family in ("sd15", "flux") else 1
    same_run(tmp_path / "one", tmp_path / "two", close, levels)


@pytest.mark.slow
def test_normalisations_in_fp32_beside_bf16_are_gathered_apart(tiny, tmp_path):
    """Krea-2's, as its pipeline has them; FSDP2 takes tensors of one dtype together."""
    keys = REWARD_GRADIENT | SHARD | {"method": {"name": "draft"}, "max_steps": 1, "checkpoint_every": 1}
    keys |= {"backbone__dtype": "bf16", "backbone__checkpoint": ["denoiser"], "sampler": {"steps": 2}}
    keys |= {"smoothing": {"image": None, "parameters": None}}  # which would enlarge what bf16 rounds
    # Steps in proportion to gradients: Adam's own are as long where a gradient is rounding alone.
    keys |= {"optimizer": {"lr": 10.0, "eps": 1.0, "max_grad_norm": None, "weight_decay": 0.0}}
    for count, folder in ((1, tmp_path / "one"), (2, tmp_path / "two")):
        trained(count, tmp_path / f"logs {count}", config(tiny, folder, "krea", **keys))
    weights = [checkpoint(tmp_path / name).weights for name in ("one", "two")]
    for name, tensor in weights[1].items():
        assert tensor.dtype == (torch.float32 if "norm" in name else torch.bfloat16), name
    start = load_file(next((tiny.krea / "transformer").glob("*.safetensors")))
    moved = [{name: found[name] - start[name] for name in start if "norm" in name} for found in weights]
    assert distance(*moved) < 0.05 and all(tensor.any() for tensor in moved[1].values())


@pytest.mark.slow
@pytest.mark.parametrize("case", ["draft", "nft"])
def test_in_float64_they_agree_to_its_rounding(tiny, aux, tmp_path, case):
    short = {"max_steps": 2, "checkpoint_every": 2}  # double precision is slow here
    compared(tiny, aux, tmp_path, case, [2], 1e-12, lambda config: wide(config).model_copy(update=short), **SHARD)


@pytest.mark.slow
def test_any_number_of_ranks_goes_on_with_what_another_saved(tiny, aux, tmp_path):
    """4, then 2, then 1, then 4, and 4 twice: the weights and moments of a run that was never broken off."""
    whole, run = tmp_path / "whole", tmp_path / "run"
    smoothing = {"image": {"radius": 0.3}, "parameters": {"rho": 0.2, "direction": "friendly"}}
    keys = UNEVEN | {"data__accumulate": 2, "smoothing": smoothing}

    def run_of(folder, until, **more):  # in float64, where what is left is no rounding
        return wide(made(tiny, aux, folder, "draft", **keys, max_steps=until, **more))

    trained(4, tmp_path / "0", run_of(whole, 5))
    for until, count in enumerate((4, 2, 1, 4, 4), 1):
        trained(count, tmp_path / str(until), run_of(run, until, resume="auto" if until > 1 else None))
        assert largest_difference(whole, run, until) < 1e-12
        ours, theirs = (checkpoint(folder, until).optimizer["state"] for folder in (whole, run))
        for name in ("exp_avg", "exp_avg_sq", "step"):
            moments = [{str(i): state[name] for i, state in each.items()} for each in (ours, theirs)]
            assert distance(*moments) < 1e-11, (until, name)
    again = tmp_path / "again"
    trained(4, tmp_path / "6", run_of(again, 2))
    trained(4, tmp_path / "7", run_of(again, 5, resume="auto"))
    assert largest_difference(whole, again, 5) == 0


# torch 2.13 calls them by other names.
GATHER = "all_gather_single" if hasattr(dist, "all_gather_single") else "all_gather_into_tensor"
SCATTER = "reduce_scatter_single" if hasattr(dist, "reduce_scatter_single") else "reduce_scatter_tensor"


def watched_run(count, folder, config):
    """A run, and what each rank held and sent: by rank, from its own process."""

    def action():
        rank, sent = int(os.environ["RANK"]), {}
        for name in (GATHER, SCATTER, "all_reduce", "all_gather"):
            _count_calls(name, sent)
        with launched(Place(rank, count, rank), "cpu", 120) as world:
            held = {}

            def look(trainer, images, step):
                if step:
                    states = [value for state in trainer.optimizer.state.values() for value in state.values()]
                    held["state"] = sum(local(value).nbytes for value in states if value.numel() > 1)
                    held["weights"] = sum(local(p).nbytes for p in trainer.parameters.values())
                    held["mean"] = sum(value.nbytes for value in trainer.ema.means.values())
                else:
                    sent.clear()  # from the first update on

            code = train(config, world=world, on_samples=look).exit_code
            (folder / f"{rank}.json").write_text(json.dumps({"held": held, "sent": sent}))
            return code

    ranks = Ranks(count, folder, action)
    assert ranks.wait() == [0] * count, "\n".join(ranks.said(rank) for rank in range(count))
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(count)]


def _count_calls(name, sent):
    original = getattr(dist, name)

    def counted(*args, **options):
        own = args[0] if name == "all_reduce" else options["input"] if "input" in options else args[1]
        calls, size = sent.get(name, (0, 0))
        sent[name] = calls + 1, size + own.nbytes
        return original(*args, **options)

    setattr(dist, name, counted)


@pytest.mark.slow
def test_a_rank_holds_its_part_and_sends_no_more_than_its_calls_ask_for(tiny, aux, tmp_path):
    """DRaFT-1 with both smoothings: 2 passes of 3 calls and a graded one, for each of the rank's micro-batches."""
    keys = UNEVEN | {"max_steps": 1, "data__accumulate": 4, "samples": {"every": 1, "count": 1}, "checkpoint_every": 1}
    held = {}
    for count in (2, 4):
        found = watched_run(count, tmp_path / str(count), made(tiny, aux, tmp_path / f"run {count}", "draft", **keys))
        held[count] = [sum(one["held"].values()) for one in found]
        weights = sum(tensor.nbytes for tensor in checkpoint(tmp_path / f"run {count}").weights.values())
        # Weights, two moments and the mean, all in fp32; the first rank has the larger parts.
        assert 1.0 <= max(held[count]) / (4 * weights / count) < 1.15
        micro_batches = -(-8 // count // 2)
        calls, graded = 2 * 3 * micro_batches + 3, 2 * micro_batches  # 3 more for the grid after the update
        for one in found:
            (_, gathered), (_, scattered) = (one["sent"][name] for name in (GATHER, SCATTER))
            # Its part of the weights in every call, in graded ones (which are made again) for the way back too.
            least = (calls + 2 * graded) * weights / count
            print(count, gathered / least, scattered / (graded * weights), one["sent"])
            assert 1.0 <= gathered / least < 1.15
            assert 1.0 <= scattered / (graded * weights) < 1.15
            # Norms and figures; three numbers each time that somebody asks who is ready for what.
            assert sum(one["sent"][name][1] for name in ("all_reduce", "all_gather") if name in one["sent"]) < 4000
    assert max(held[4]) / max(held[2]) == pytest.approx(0.5, abs=0.05)


@pytest.mark.slow
def test_what_is_measured_beside_the_training_is_that_of_one(tiny, aux, tmp_path):
    """Evaluations with the best model kept, the denoising loss, agreement with a judge, the distance to the base."""
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    from PIL import Image

    for index in range(3):
        Image.effect_noise((40, 36), 60 + index).convert("RGB").save(pictures / f"{index}.png")
        (pictures / f"{index}.txt").write_text("a red circle")
    other = write_clip(tmp_path / "other", seed=9, context=40)
    judge = {"name": "clip", "path": str(other)}
    keys = {
        "evaluation": {"rewards": {"other": judge}, "every": 1, "count": 5, "best": "held_out/other"},
        "denoising": {"images": str(pictures), "batch_size": 3, "every": 1},
        "agreement": {"judges": {"other": judge}, "every": 1, "pictures": 16, "space": "latent"},
        "regularize": {"kl_to_base": 0.1},
        "max_steps": 3,
        "checkpoint_every": 3,
        "ema": {"decay": 0.5},
    }
    one, shard, replicate = tmp_path / "one", tmp_path / "shard", tmp_path / "replicate"
    trained(1, tmp_path, made(tiny, aux, one, "draft", **(SHARD | keys)))
    trained(3, tmp_path / "a", made(tiny, aux, shard, "draft", **(SHARD | keys | {"data__accumulate": 3})))
    trained(1, tmp_path, made(tiny, aux, tmp_path / "b", "draft", **(SHARD | keys | {"data__accumulate": 3})))
    trained(2, tmp_path / "c", made(tiny, aux, replicate, "draft", **(keys | {"parameters__train": "lora"})))
    trained(1, tmp_path, made(tiny, aux, tmp_path / "d", "draft", **(keys | {"parameters__train": "lora"})))
    for alone, many in ((tmp_path / "b", shard), (tmp_path / "d", replicate)):
        assert largest_difference(alone, many) < 1e-6
        for file in ("metrics.jsonl", "evaluations.jsonl"):
            ours, theirs = (
                [json.loads(line) for line in (folder / file).read_text().splitlines()] for folder in (alone, many)
            )
            assert len(ours) == len(theirs) > 2
            for before, after in zip(ours, theirs):
                before, after = (one.get("values", one) for one in (before, after))
                for name in before.keys() - {"seconds"}:
                    assert after[name] == pytest.approx(before[name], rel=3e-3, abs=2e-5), (file, name)
        ours, theirs = (json.loads((folder / "best/evaluation.json").read_text()) for folder in (alone, many))
        assert ours["step"] == theirs["step"]
        best = [load_file(next((folder / "best").glob("*/*.safetensors"))) for folder in (alone, many)]
        assert distance(*best) < 1e-6


@pytest.mark.parametrize(
    "tries", [pytest.param(1, marks=pytest.mark.slow), pytest.param(10, marks=pytest.mark.campaign)]
)
def test_ranks_that_are_killed_lose_nothing(tiny, tmp_path, monkeypatch, tries):
    """Runs, a random rank of each killed at a random moment, and gone on with: the unbroken run's bits."""
    monkeypatch.setattr(launch, "PATIENCE", 4.0)
    draw = random.Random(seed := random.randrange(10**6))
    print("seed", seed)
    common = {"max_steps": 6, "checkpoint_every": 1, "data__accumulate": 2, "optimizer": {"lr": 1e-3}}
    common |= SHARD | {"distributed": {"strategy": "shard", "timeout": 60}, "ema": {"decay": 0.9}}
    path = lambda folder: write_recipe(  # noqa: E731
        tmp_path / f"{folder.name}.yaml", recipe(tiny, folder, "sd3", **common)
    )
    whole = tmp_path / "whole"
    began = time.monotonic()
    assert command(2, tmp_path / "logs", "train", path(whole)).wait() == [0, 0]
    took = time.monotonic() - began
    for number in range(tries):
        run, killed = tmp_path / f"run {number}", draw.randrange(2)
        ranks = command(2, tmp_path / f"logs {number}", "train", path(run))
        time.sleep(draw.uniform(0.1, 1.0) * took)
        ranks.signal(killed)
        began = time.monotonic()
        codes = ranks.wait(60)
        print(number, killed, codes, f"{time.monotonic() - began:.1f} s")
        if codes != [0, 0]:
            assert codes[killed] in (-signal.SIGKILL, 0) and codes[1 - killed] in (0, 1, 2), ranks.said(1 - killed)
            assert command(2, tmp_path / f"again {number}", "train", path(run), "resume=auto").wait() == [0, 0]
        assert largest_difference(whole, run, 6) == 0


@pytest.mark.slow
def test_an_error_on_one_rank_ends_all(tiny, tmp_path):
    reward = {"name": "python", "path": "builders.ranks:nan_on_rank_1"}
    keys = SHARD | {"reward": reward, "sharpness": None, "smoothing": None, "distributed": {"timeout": 60}}
    path = write_recipe(tmp_path / "recipe.yaml", recipe(tiny, tmp_path / "run", "sd3", data__accumulate=2, **keys))
    ranks = command(2, tmp_path / "logs", "train", path)
    assert ranks.wait(60) == [2, 2]
    errors = [line for rank in (0, 1) for line in ranks.said(rank).splitlines() if "rsaft-fast: error: " in line]
    assert len(errors) == 1 and "rank 1 of 2" in errors[0] and "nan" in errors[0]


REFUSED = {
    "optimizer.release_gradients": {"optimizer__release_gradients": True},
    "parameters.train lora": {"parameters__train": "lora"},
    "speed.cuda_graph": {"speed": {"cuda_graph": True}},
    "speed.channels_last": {"speed": {"channels_last": True}},
    "speed.compile": {"speed": {"compile": "all"}},
    "optimizer.offload state": {"optimizer__offload": "state"},
    "backbone.offload_blocks 2": {"backbone__offload_blocks": 2},
    "backbone.quantize nf4": {"backbone__quantize": "nf4"},
    "agreement.space parameter": {
        "agreement": {"judges": {"other": {"name": "python", "path": "builders.ranks:nan_on_rank_1"}}}
    },
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_does_not_go_with_shards_is_refused(tiny, tmp_path, what):
    settings = config(tiny, tmp_path / "run", **({**SHARD, "distributed": {"strategy": "shard"}} | REFUSED[what]))
    with pytest.raises(UserError, match=says(*what.split())):
        check_several(settings, 2)


def test_lora_replicates_and_full_parameters_are_parted(tiny, tmp_path):
    full = config(tiny, tmp_path / "run", parameters__train="full")
    assert full.shards(2) and not full.shards(1) and not config(tiny, tmp_path / "run").shards(2)
    assert not config(tiny, tmp_path / "run", **SHARD, **{"distributed__strategy": "replicate"}).shards(2)
