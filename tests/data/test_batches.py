"""Prompt order, encodings and micro-batches follow from (seed, step) alone."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from builders.messages import says
from builders.recipes import PROMPTS
from hypothesis import given, settings
from hypothesis import strategies as st

from rsaft_fast import playground
from rsaft_fast.backbones import load_backbone
from rsaft_fast.data.batches import PromptBatches, epoch_order
from rsaft_fast.data.encoded import EncodedPrompts
from rsaft_fast.data.prompts import load_prompts
from rsaft_fast.distributed import World
from rsaft_fast.errors import UserError
from rsaft_fast.recipe.config import DataSettings, SamplerSettings


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 2**40), st.integers(1, 20), st.integers(0, 60), st.integers(0, 30))
def test_every_epoch_is_a_permutation_however_it_is_cut(seed, size, first, count):
    whole = epoch_order(seed, size, 0, first + count + size)
    assert epoch_order(seed, size, first, count) == whole[first : first + count]
    for epoch in range(len(whole) // size):
        assert sorted(whole[epoch * size : (epoch + 1) * size]) == list(range(size))


def test_epochs_seeds_and_streams_differ():
    orders = [
        epoch_order(0, 50, 0, 50),
        epoch_order(0, 50, 50, 50),
        epoch_order(1, 50, 0, 50),
        epoch_order(0, 50, 0, 50, 1),
    ]
    assert len({tuple(order) for order in orders}) == 4


def test_global_generators_neither_matter_nor_move():
    torch.manual_seed(1)
    np.random.seed(1)
    before = torch.get_rng_state(), np.random.get_state()[1].copy()
    first = epoch_order(7, 30, 0, 30)
    assert torch.equal(before[0], torch.get_rng_state()) and (before[1] == np.random.get_state()[1]).all()
    torch.manual_seed(2)
    assert epoch_order(7, 30, 0, 30) == first


@pytest.fixture(scope="module")
def backbone(tiny):
    return load_backbone(tiny.sd3)


def test_a_prompts_encoding_does_not_depend_on_its_company(backbone):
    alone = EncodedPrompts.encode(backbone, ["one"], SamplerSettings())(["one"])
    among = EncodedPrompts.encode(backbone, PROMPTS, SamplerSettings())([*PROMPTS, "one"])
    for name, row in alone.positive.items():
        assert torch.equal(row[0], among.positive[name][-1])
    assert alone.negative is None and len(among) == len(PROMPTS) + 1


def test_encodings_are_the_backbones_own(backbone):
    encoded = EncodedPrompts.encode(backbone, PROMPTS, SamplerSettings(negative_prompt="blurred", guidance_scale=3.0))(
        PROMPTS
    )
    direct = backbone.encode(list(PROMPTS), "blurred", 3.0)
    for ours, theirs in ((encoded.positive, direct.positive), (encoded.negative, direct.negative)):
        assert ours.keys() == theirs.keys()
        for name in ours:
            torch.testing.assert_close(ours[name], theirs[name], rtol=1e-5, atol=1e-6)
    assert encoded.guidance_scale == 3.0


def batches(**overrides) -> PromptBatches:
    data = DataSettings(prompts="x", **overrides)
    return PromptBatches(data, PROMPTS, seed=5)


def test_micro_batches_split_the_samples_and_nothing_else(backbone):
    encoded = EncodedPrompts.encode(backbone, PROMPTS, SamplerSettings())
    (whole,) = batches(batch_size=6)(backbone, encoded, 3)
    parts = batches(batch_size=2, accumulate=3)(backbone, encoded, 3)
    assert [prompt for part in parts for prompt in part.prompts] == list(whole.prompts)
    assert torch.equal(torch.cat([part.latents for part in parts]), whole.latents)
    assert [part.index for part in parts] == [0, 1, 2]
    assert [i for part in parts for i in part.noise.samples] == list(range(6))


def test_ranks_take_their_share_of_the_same_samples(backbone):
    encoded = EncodedPrompts.encode(backbone, PROMPTS, SamplerSettings())
    (whole,) = batches(batch_size=6)(backbone, encoded, 3)
    data = DataSettings(prompts="x", batch_size=2, accumulate=3)
    for ranks in (2, 4, 6):
        worlds = [World(rank, ranks) for rank in range(ranks)]
        each = [PromptBatches(data, PROMPTS, seed=5, world=world)(backbone, encoded, 3) for world in worlds]
        parts = [part for batches in each for part in batches]
        assert [prompt for part in parts for prompt in part.prompts] == list(whole.prompts)
        assert torch.equal(torch.cat([part.latents for part in parts]), whole.latents)
        assert [i for part in parts for i in part.noise.samples] == list(range(6))
        assert [batches.total for batches in each] == [6] * ranks
        # A sample's plan follows from its micro-batch's number, which is that of one process.
        assert all(part.index == i // 2 for part in parts for i in part.noise.samples)
        assert [len(batches) for batches in each] == list(map(len, [list(batches) for batches in each]))


def test_steps_have_noise_of_their_own(backbone):
    encoded = EncodedPrompts.encode(backbone, PROMPTS, SamplerSettings())
    source = PromptBatches(DataSettings(prompts="x", batch_size=2), PROMPTS, seed=0)
    one, two = (source(backbone, encoded, step)[0] for step in (0, 1))
    assert not torch.equal(one.latents, two.latents)
    assert not torch.equal(one.latents[0], one.latents[1])


def test_visited_prompts_are_those_that_the_updates_draw():
    source = batches(batch_size=3)
    assert source.visited(range(0)) == []
    drawn = [text for step in range(2, 5) for text in source.texts(step)]
    assert source.visited(range(2, 5)) == list(dict.fromkeys(drawn))


def test_the_playgrounds_held_out_prompts_are_not_its_training_prompts():
    train, held_out = load_prompts("playground"), load_prompts("playground", held_out=True)
    assert train == playground.train_prompts() and held_out == playground.eval_prompts()
    assert not set(train) & set(held_out)


def grouped(**overrides) -> PromptBatches:
    return batches(**{"batch_size": 3, "group_size": 4, "prompts_per_iteration": 3} | overrides)


def test_a_group_stays_together(backbone):
    source = grouped()
    texts = source.texts(1)
    order = [PROMPTS[i] for i in epoch_order(5, len(PROMPTS), 3, 3)]
    assert texts == [prompt for prompt in order for _ in range(4)]
    encoded = EncodedPrompts.encode(backbone, PROMPTS, SamplerSettings())
    made = source(backbone, encoded, 1)
    assert [prompt for batch in made for prompt in batch.prompts] == texts == made.prompts
    assert len(made) == 4 and [batch.index for batch in made] == [0, 1, 2, 3]
    assert sorted(source.visited(range(2))) == sorted({*source.texts(0), *source.texts(1)})
    # As many at a time as somebody likes: the same samples.
    (whole,) = made.of(12)
    assert torch.equal(whole.latents, torch.cat([batch.latents for batch in made]))
    assert [len(batch.prompts) for batch in made.of(5, 8)] == [5, 3]


def test_a_group_may_share_its_initial_noise(backbone):
    encoded = EncodedPrompts.encode(backbone, PROMPTS, SamplerSettings())
    (different,), (same,) = (grouped(group_noise=kind)(backbone, encoded, 1).of(12) for kind in ("different", "same"))
    assert len({tuple(row.flatten().tolist()) for row in different.latents}) == 12
    for first in (0, 4, 8):
        assert all(torch.equal(same.latents[first], row) for row in same.latents[first : first + 4])
    assert not torch.equal(same.latents[0], same.latents[4])
    assert same.noise == different.noise  # what the sampler draws on the way is each sample's own


def test_groups_go_whole_to_the_ranks():
    data = DataSettings(prompts="x", batch_size=4, group_size=4, prompts_per_iteration=3)
    sources = [PromptBatches(data, PROMPTS, seed=5, world=World(rank, 2)) for rank in (0, 1)]
    assert [list(source(None, None, 0).samples) for source in sources] == [list(range(4)), list(range(4, 12))]
    with pytest.raises(UserError, match=says("data.prompts_per_iteration", 3, 4)):
        PromptBatches(data, PROMPTS, seed=5, world=World(0, 4))
