"""Frozen weights in parts on several ranks: the bits of weights that are whole, for ranks that ask unequally often."""

from __future__ import annotations

import copy
import random
import weakref

import pytest
import torch
from builders.clip import write_clip
from builders.dino import write_dino
from builders.hpsv3 import SmallHpsv3, write_hpsv3
from builders.image_reward import write_image_reward
from builders.ranks import computed
from torch import nn

from rsaft_fast.distributed import World
from rsaft_fast.distributed.turns import Turns
from rsaft_fast.memory.shared import RehearsedSharing, Sharing, share_weights
from rsaft_fast.rewards import Reward, RewardSettings, load_reward
from rsaft_fast.rewards.base import RewardSpec
from rsaft_fast.rewards.features import load_features

RANKS = 3
PROMPTS = ["a red circle", "two blue squares", "one", "a green triangle"]
pytestmark = pytest.mark.filterwarnings("ignore:this is not the instruction")


class Own(Reward):
    """One of a user's: layers that nothing recomputes, and a weight in another dtype."""

    spec = RewardSpec("own")

    def __init__(self):
        super().__init__()
        torch.manual_seed(3)
        self.layers = nn.ModuleList(nn.Sequential(nn.Conv2d(3, 5, 3), nn.GELU(), nn.Conv2d(5, 3, 3)) for _ in range(3))
        self.layers[2].register_parameter("scale", nn.Parameter(torch.rand(3, 1, 1).double()))
        self.requires_grad_(False)

    def shared_blocks(self):
        return list(self.layers)

    def score(self, images, prompts):
        for layer in self.layers:
            images = images + layer(images).mean((2, 3), keepdim=True).exp()
        return images.mean((1, 2, 3)).exp()


@pytest.fixture(scope="module")
def loaders(tmp_path_factory):
    folder = tmp_path_factory.mktemp("rewards")
    clip, image_reward = write_clip(folder / "clip"), write_image_reward(folder / "imagereward")
    hpsv3, dino = write_hpsv3(folder / "hpsv3"), write_dino(folder / "dino")
    qwen = SmallHpsv3(path=str(hpsv3), instruction=str(hpsv3 / "instruction.txt"))
    parts = [{"name": "clip", "path": str(clip)}, {"name": "imagereward", "path": str(image_reward), "label": "b"}]
    return {
        "clip": lambda: load_reward("clip", clip),
        "kept": lambda: load_reward("clip", clip, checkpoint=False),
        "imagereward": lambda: load_reward("imagereward", image_reward, dtype=torch.bfloat16),
        "hpsv3": lambda: load_reward(qwen),
        "worst": lambda: load_reward(RewardSettings(name="combination", parts=parts)),
        "dino": lambda: load_features(dino),
        "own": Own,
    }


def script(seed, names):
    """What each rank asks until they meet: of which reward, of how many pictures, with a gradient or without."""
    draw = random.Random(seed)
    kinds = [(name, graded) for name in names for graded in (True, False)]
    counts = draw.sample([0, 1, 2, 3], RANKS)  # never equally many
    return [[(*draw.choice(kinds), draw.choice([1, 2, 4])) for _ in range(count)] for count in counts]


def ask(module, graded, count, seed):
    images = torch.rand(count, 3, 40, 36, generator=torch.Generator().manual_seed(seed)).requires_grad_(graded)
    scored = [images] if not hasattr(module, "spec") or not hasattr(module, "score") else [images, PROMPTS[:count]]
    with torch.set_grad_enabled(graded):
        scores = module(*scored)
    (gradient,) = torch.autograd.grad(scores.square().sum(), images) if graded else (None,)
    return scores.detach(), gradient


def answers(modules, own, seed):
    return [ask(modules[name], graded, count, seed + place) for place, (name, graded, count) in enumerate(own)]


def held_by(module):
    return sum(tensor.nbytes for tensor in (*module.parameters(), *module.buffers()))


def of_rank(rank, loaders, seed, rounds):
    world = World(rank, RANKS)
    sharing = Sharing(Turns(world))
    modules, held = {name: load() for name, load in loaders.items()}, {}
    for name, module in modules.items():
        whole = held_by(module)
        blocks = sum(weight.nbytes for block in module.shared_blocks() for weight in block.parameters())
        parted = share_weights(module.shared_blocks(), sharing)
        held[name] = whole, blocks, parted, held_by(module)
    found = []
    for number in range(rounds):
        found.append(answers(modules, script(seed + number, modules)[rank], 100 * number + 10 * rank))
        world.sum(torch.ones(1))
    return found, held


@pytest.mark.parametrize("rounds", [1, pytest.param(6, marks=pytest.mark.slow)])
def test_scores_and_gradients_are_the_bits_of_whole_weights_whoever_asks_how_often(loaders, tmp_path, rounds):
    seed = random.randrange(10**6)
    print("seed", seed)
    found = computed(RANKS, tmp_path, of_rank, loaders, seed, rounds)
    modules = {name: load() for name, load in loaders.items()}
    asked = 0
    for number in range(rounds):
        for rank, own in enumerate(script(seed + number, modules)):
            wanted = answers(modules, own, 100 * number + 10 * rank)
            assert len(found[rank][0][number]) == len(own)
            for (scores, gradient), (ours, slope), entry in zip(found[rank][0][number], wanted, own):
                asked += 1
                assert torch.equal(scores, ours), entry
                assert gradient is slope is None or torch.equal(gradient, slope), entry
    assert asked >= rounds * RANKS
    for _, held in found:
        for name, (whole, blocks, parted, own) in held.items():
            assert own == whole - blocks + parted // RANKS, name
            assert 0 < blocks <= parted < 3 * blocks, name  # each weight is padded to 256 bytes


def each_alike(rank, load):
    """All ranks together: the same pictures, and a copy in float32 made after the weights were parted."""
    world, reward = World(rank, 2), load()
    share_weights(reward.shared_blocks(), Sharing(Turns(world)))
    other = copy.deepcopy(reward).float()
    found = [ask(reward, True, 2, 5), ask(other, True, 2, 5), ask(reward, False, 2, 5)]
    world.sum(torch.ones(1))
    return found, {str(part.dtype) for part in other.buffers() if part.is_floating_point()}


def test_a_copy_in_another_precision_is_shared_as_well(loaders, tmp_path):
    reward = loaders["imagereward"]()
    wanted = [ask(reward, True, 2, 5), ask(copy.deepcopy(reward).float(), True, 2, 5), ask(reward, False, 2, 5)]
    assert not torch.equal(wanted[0][0], wanted[1][0])
    for found, dtypes in computed(2, tmp_path, each_alike, loaders["imagereward"]):
        torch.testing.assert_close(found, wanted, rtol=0, atol=0)
        assert dtypes == {"torch.float32"}


def test_weights_outside_a_call_are_not_there(loaders, tmp_path):
    """Whoever reads them around the block finds nothing, and not a part taken for the whole."""

    def looked(rank):
        reward = loaders["clip"]()
        (first, *_) = reward.shared_blocks()
        share_weights(reward.shared_blocks(), Sharing(Turns(World(rank, 2))))
        return [weight.numel() for weight in first.parameters()], reward.dtype, reward.device.type

    for sizes, dtype, device in computed(2, tmp_path, looked):
        assert set(sizes) == {0} and dtype == torch.float32 and device == "cpu"


def test_trained_tied_and_strided_weights_stay_where_they_are():
    block = nn.Sequential(*(nn.Linear(4, 4) for _ in range(4))).requires_grad_(False)
    block[0].weight.requires_grad_(True)
    block[1].weight = block[2].weight
    block[3].weight = nn.Parameter(torch.rand(4, 4).T, requires_grad=False)
    wanted = block(x := torch.rand(2, 4))
    share_weights([block], Alone())
    assert torch.equal(block(x), wanted)
    sizes = {name: weight.numel() for name, weight in block.named_parameters()}
    assert sizes == {"0.weight": 16, "1.weight": 16, "3.weight": 16} | {f"{i}.bias": 0 for i in range(4)}


class Alone(RehearsedSharing):
    """One rank, whose part is all; counts the gathered tensors that are alive at a time."""

    def __init__(self):
        super().__init__(1)
        self.alive, self.most, self.gathers = [], 0, 0

    def whole(self, part):
        whole = part.clone()
        self.alive = [seen for seen in self.alive if seen() is not None] + [weakref.ref(whole)]
        self.most, self.gathers = max(self.most, len(self.alive)), self.gathers + 1
        return whole


@pytest.mark.parametrize("checkpoint", [True, False])
def test_one_block_at_a_time_is_whole_in_the_backward_pass_too(tmp_path, checkpoint):
    folder = write_clip(tmp_path / "deep", num_hidden_layers=6)
    reward, other = (load_reward("clip", folder, checkpoint=checkpoint) for _ in range(2))
    share_weights(reward.shared_blocks(), sharing := Alone())
    found, wanted = ask(reward, True, 3, 1), ask(other, True, 3, 1)
    torch.testing.assert_close(found, wanted, rtol=0, atol=0)
    # Forward, and again for the way back, which finds the last block's weights no longer there.
    assert sharing.gathers == 12 and sharing.most == 1
