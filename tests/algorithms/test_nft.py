"""DiffusionNFT and GARDO as they train: gradients against the equations by autograd, copies, resuming."""

from __future__ import annotations

import pytest
import torch
import yaml
from builders.backbones import FAMILIES, PROMPTS, cfg, clear_gradients, gradients, make_backbone, relative_error
from builders.messages import says
from doors.test_own_backbone import recipe
from doors.toy_backbone import ToyBackbone
from safetensors.torch import load_file

from rsaft_fast.algorithms.base import At
from rsaft_fast.algorithms.copies import REFERENCE
from rsaft_fast.algorithms.flow_grpo import FlowGRPO
from rsaft_fast.algorithms.nft import NFT, OLD
from rsaft_fast.algorithms.update import update
from rsaft_fast.cli import main
from rsaft_fast.data.batches import PromptBatches
from rsaft_fast.data.encoded import EncodedPrompts
from rsaft_fast.distributed import World
from rsaft_fast.errors import UserError
from rsaft_fast.methods import NFT as Settings
from rsaft_fast.methods import FlowGRPO as GRPOSettings
from rsaft_fast.optim import SAM
from rsaft_fast.recipe.check import check_settings
from rsaft_fast.recipe.config import DataSettings, SamplerSettings
from rsaft_fast.recipe.load import load_config
from rsaft_fast.rewards import Reward, RewardSpec
from rsaft_fast.rewards.combine import Combination, Part
from rsaft_fast.train.checkpoint import read

T, SEED = 3, 5


class Channel(Reward):
    """The mean of one colour."""

    def __init__(self, index: int):
        super().__init__()
        self.index, self.spec = index, RewardSpec(f"channel {index}")

    def score(self, images, prompts):
        return images[:, self.index].mean((1, 2)).double()


def proxy_and_auxiliary() -> Combination:
    return Combination([Part("proxy", Channel(0)), Part("light", Channel(1), weight=0.0)], "weighted")


def toy(dtype=torch.float64) -> ToyBackbone:
    backbone = ToyBackbone(height=16, width=16, dtype=dtype, device=torch.device("cpu"))
    backbone.latent_dtype = dtype
    backbone.decoder.to(dtype)
    backbone.train_all_parameters()
    return backbone


@pytest.fixture(scope="module", params=["toy", *FAMILIES])
def backbone(request, tmp_path_factory):
    if request.param == "toy":
        return toy()
    return make_backbone(request.param, tmp_path_factory.mktemp(request.param), dtype=torch.float64)


@torch.no_grad()
def move(backbone, scale, seed):
    draw = torch.Generator().manual_seed(seed)
    for p in backbone.trainable_parameters.values():
        p.add_(scale * torch.randn(p.shape, generator=draw, dtype=p.dtype))


def prepared(backbone, settings, kind=NFT, reward=None, guidance=1.0, **data):
    """What an iteration collects with old weights that are neither the reference's nor the trained ones."""
    move(backbone, 0.02, 0)
    algorithm = kind(backbone, reward or Channel(0), settings, T)
    options = {"batch_size": 2, "group_size": 2, "prompts_per_iteration": 2} | data
    source = PromptBatches(DataSettings(prompts="x", **options), PROMPTS, SEED)
    encoded = EncodedPrompts.encode(backbone, PROMPTS, SamplerSettings(**cfg(backbone, guidance)))
    move(backbone, 0.02, 1)
    if kind is NFT:
        algorithm.copies.take(OLD)
    experience = algorithm.collect(source(backbone, encoded, 4))
    algorithm.judge(experience, World())
    move(backbone, 0.02, 2)
    return algorithm, experience


def gradient_of(algorithm, parts, at=At.PLAIN):
    clear_gradients(algorithm.backbone)
    sums = {}
    for part in parts:
        for name, share in algorithm.backward(part, at).items():
            sums[name] = sums.get(name, 0.0) + float(share)
    return gradients(algorithm.backbone), sums


@torch.no_grad()
def predictions_of(algorithm, experience, parts, name):
    """A copy's predictions at every noised sample, before any graph: the weights are changed in place."""
    backbone, found = algorithm.backbone, {}
    with algorithm.copies.applied(name):
        for index, part in enumerate(parts):
            branch = experience.batches.conditioning(part.places).positive
            for call in range(algorithm.settings.trained_calls(T)):
                step = backbone.schedule(T)[call]
                found[index, call] = backbone.predict(noised(experience, part, call, step), step, branch)
    return found


def noised(experience, part, call, step):
    clean = experience.latents[T][list(part.places)]
    noise = experience.batches.noise(part.places).draw("renoise", clean.shape[1:], call, clean.dtype)
    return step.alpha * clean + step.sigma * noise


def by_equations(algorithm, experience, parts, kl_weight, advantage):
    """DiffusionNFT's loss from the paper, a graph of every call at once; `advantage`: (N,) as Z divides it."""
    backbone, settings, loss, kl = algorithm.backbone, algorithm.settings, 0.0, 0.0
    schedule, total = backbone.schedule(T), sum(len(part.places) for part in parts)
    calls = settings.trained_calls(T)
    olds, references = (predictions_of(algorithm, experience, parts, name) for name in (OLD, REFERENCE))
    for index, part in enumerate(parts):
        places = list(part.places)
        branch = experience.batches.conditioning(part.places).positive
        clean = experience.latents[T][places]
        r = (0.5 + 0.5 * advantage[places].clamp(-1, 1)).view(-1, *[1] * (clean.ndim - 1))
        for call in range(calls):
            step = schedule[call]
            x, old, reference = noised(experience, part, call, step), olds[index, call], references[index, call]
            v, b = backbone.predict(x, step, branch), settings.nft_beta
            for weight, implicit in ((r, (1 - b) * old + b * v), (1 - r, (1 + b) * old - b * v)):
                if step.a == 1:
                    error = x - step.sigma * implicit - clean
                else:
                    error = (x - step.sigma * implicit) / step.alpha - clean
                size = error.detach().abs().flatten(1).mean(1).view(r.shape)
                loss = loss + (weight * error**2 / size).flatten(1).mean(1).sum() / (total * calls)
            gate = experience.gate[places]
            kl = kl + (gate * (v - reference).square().flatten(1).mean(1)).sum() / (total * calls)
    return loss + kl_weight * kl


def autograd_of(backbone, loss):
    parameters = backbone.trainable_parameters
    found = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
    return {n: torch.zeros_like(p) if g is None else g for (n, p), g in zip(parameters.items(), found)}


@pytest.mark.parametrize("gated", [False, True])
def test_the_gradient_is_the_equations(backbone, gated):
    gardo = {"kl_weight": 0.3, "diversity": None, "gate": {"share": 0.5, "adapt": None}} if gated else None
    settings = Settings(nft_beta=0.5, kl_weight=0.3, timestep_fraction=0.7, gardo=gardo)
    algorithm, experience = prepared(backbone, settings, reward=proxy_and_auxiliary() if gated else None)
    rewards = experience.scores.rewards.view(2, 2)
    assert set(experience.latents) == {T} and experience.calls == (0, 1)
    std = 1.0 if gated else rewards.std(correction=0) + 1e-4
    advantage = ((rewards - rewards.mean(1, keepdim=True)) / std).flatten()
    if gated:
        experience.gate[:] = torch.tensor([1.0, 0, 0, 1])
    parts = algorithm.parts(experience, 0)
    loss = by_equations(algorithm, experience, parts, 0.3, advantage)
    wanted = autograd_of(backbone, loss)  # at once: the algorithm swaps weights in place
    ours, sums = gradient_of(algorithm, parts)
    assert relative_error(ours, wanted) < 1e-9
    assert sums["loss"] == pytest.approx(float(loss.detach()), rel=1e-9)
    assert sums["kl"] > 0 and sums["off_old"] > 0 and (sums["gated_kl"] < sums["kl"]) == gated


def test_a_perturbed_update_is_a_hand_written_sam_step():
    backbone, rho = toy(), 0.02
    algorithm, experience = prepared(backbone, Settings(kl_weight=0.3))
    parts, weights = algorithm.parts(experience, 0), backbone.trainable_parameters
    rewards = experience.scores.rewards.view(2, 2)
    advantage = ((rewards - rewards.mean(1, keepdim=True)) / (rewards.std(correction=0) + 1e-4)).flatten()
    before = {n: p.detach().clone() for n, p in weights.items()}
    ascent = autograd_of(backbone, by_equations(algorithm, experience, parts, 0.3, advantage))
    norm = sum(g.square().sum() for g in ascent.values()).sqrt()
    with torch.no_grad():
        for name, p in weights.items():
            p.add_(rho * ascent[name] / norm)
    wanted = autograd_of(backbone, by_equations(algorithm, experience, parts, 0.3, advantage))
    with torch.no_grad():
        for name, p in weights.items():
            p.copy_(before[name])
    optimizer = SAM(weights.values(), torch.optim.SGD, rho=rho, lr=1.0)
    update(algorithm, optimizer, parts, perturbs=True)
    assert relative_error({n: before[n] - p.detach() for n, p in weights.items()}, wanted) < 1e-8


def test_pictures_are_the_old_policys_and_it_follows():
    backbone = toy()
    settings = Settings(updates=2, old={"slope": 0.1, "most": 0.9})
    algorithm, experience = prepared(backbone, settings, prompts_per_iteration=4)
    now = {n: p.detach().clone() for n, p in backbone.trainable_parameters.items()}
    old = {n: t.clone() for n, t in algorithm.copies.tensors[OLD].items()}
    with torch.no_grad(), algorithm.copies.applied(OLD):
        x = experience.batches.initial_latents(range(8))
        for step in backbone.schedule(T):
            x = step.a * x + step.b * backbone.predict(x, step, experience.batches.conditioning(range(8)).positive)
    torch.testing.assert_close(experience.latents[T], x, rtol=1e-9, atol=1e-9)
    assert all(torch.equal(now[n], p) for n, p in backbone.trainable_parameters.items())
    algorithm.after_update({})
    assert all(torch.equal(old[n], t) for n, t in algorithm.copies.tensors[OLD].items())
    algorithm.after_update({})  # the iteration is over: decay 0.2
    for name, tensor in algorithm.copies.tensors[OLD].items():
        torch.testing.assert_close(tensor, 0.2 * old[name] + 0.8 * now[name])


@pytest.mark.parametrize("kind, settings", [(NFT, Settings), (FlowGRPO, GRPOSettings)])
def test_the_reference_follows_by_its_rule(kind, settings):
    backbone = toy()
    gardo = {"gate": None, "diversity": None, "reference": {"kl_threshold": 0.5, "max_age": 2}}
    algorithm, _ = prepared(backbone, settings(gardo=gardo), kind)
    first = algorithm.copies.tensors[REFERENCE]["to_hidden.weight"].clone()
    held = lambda: algorithm.copies.tensors[REFERENCE]["to_hidden.weight"]  # noqa: E731
    algorithm.after_update({"kl": 0.4, "gated_kl": 9.0})
    assert torch.equal(held(), first)
    algorithm.after_update({"kl": 0.6})
    assert torch.equal(held(), backbone.network.to_hidden.weight) and not torch.equal(held(), first)
    move(backbone, 0.1, 3)
    algorithm.after_update({"kl": 0.1})
    assert not torch.equal(held(), backbone.network.to_hidden.weight)
    algorithm.after_update({"kl": None})  # an iteration that said nothing makes nothing older
    state = algorithm.state()
    algorithm.after_update({"kl": 0.1})
    assert torch.equal(held(), backbone.network.to_hidden.weight) and algorithm.rule.resets == 2
    algorithm.load(state)
    assert (algorithm.rule.age, algorithm.rule.resets) == (1, 1)


def test_long_predictions_cost_where_norm_weight_says_so():
    backbone = toy()
    gardo = {"gate": None, "diversity": None, "kl_weight": 0.0, "norm_weight": 0.7, "reference": None}
    algorithm, experience = prepared(backbone, Settings(gardo=gardo))
    parts = algorithm.parts(experience, 0)
    with torch.no_grad():
        for p in backbone.trainable_parameters.values():
            p.mul_(1.5)
    with_it, sums = gradient_of(algorithm, parts)
    algorithm.norm_weight = 0.0
    without, plain = gradient_of(algorithm, parts)
    penalty, references = 0.0, predictions_of(algorithm, experience, parts, REFERENCE)
    for (index, call), reference in references.items():
        step, branch = backbone.schedule(T)[call], experience.batches.conditioning(parts[index].places).positive
        f = backbone.predict(noised(experience, parts[index], call, step), step, branch)
        ratio = f.flatten(1).norm(dim=1) / reference.flatten(1).norm(dim=1)
        penalty = penalty + 0.7 * (ratio - 1).clamp(min=0).sum() / (4 * 2)
    wanted = autograd_of(backbone, penalty)
    assert relative_error({n: with_it[n] - without[n] for n in with_it}, wanted) < 1e-8
    assert sums["loss"] - plain["loss"] == pytest.approx(float(penalty.detach())) and sums["longer"] > 0


PARTS = [
    {"name": "clip", "path": "playground/brittle", "label": "proxy"},
    {"name": "clip", "path": "playground/fair", "label": "light", "weight": 0.0},
]
GARDO = {
    "gate": {"share": 0.5, "adapt": {"window": 1}, "signals": {"s1": 0.5, "agreement": 0.5}},
    "reference": {"max_age": 3},
    "diversity": {"features": "playground/fair"},
    "norm_weight": 0.1,
}


def written(folder, out, method, **keys):
    changes = {
        "sampler": {"steps": 3, "guidance_scale": 1.0},
        "method": {"name": method, "gardo": GARDO},
        "smoothing": {"image": None, "parameters": {"rho": 0.1}},
        "reward": {"name": "combination", "parts": PARTS},
        "samples": {"every": 0},
    }
    path = recipe(folder, out, **changes | keys)
    raw = yaml.safe_load(path.read_text())
    raw["data"] |= {"group_size": 4, "prompts_per_iteration": 2, "batch_size": 4}
    path.write_text(yaml.safe_dump(raw))
    return str(path)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["nft", "flow_grpo"])
def test_gardo_trains_and_resumes_to_the_same_bits(tmp_path, method, capfd):
    assert main(["train", written(tmp_path, "whole", method)]) == 0
    assert says("compares", "light", "features of playground/fair (clip)").search(capfd.readouterr().err)
    assert main(["train", written(tmp_path, "halves", method, max_steps=2)]) == 0
    assert main(["train", written(tmp_path, "halves", method), "resume=auto"]) == 0
    ends = [read(tmp_path / name / "checkpoints/step_4") for name in ("whole", "halves")]
    for of in ("weights", "algorithm"):
        one, other = (getattr(end, of) for end in ends)
        assert one and all(torch.equal(one[name], other[name]) for name in one | other)
    copies = [end.copies for end in ends]
    assert REFERENCE in copies[0] and (OLD in copies[0]) == (method == "nft")
    for name, tensors in copies[0].items():
        assert all(torch.equal(tensors[key], copies[1][name][key]) for key in tensors)
    first = load_file(tmp_path / "whole/checkpoints/step_2/copy_reference.safetensors")
    assert any(not torch.equal(first[key], copies[0][REFERENCE][key]) for key in first)  # reset at 3
    lines = (tmp_path / "whole/metrics.jsonl").read_text()
    for figure in ("uncertainty", "gated", "gate_share", "diversity", "reference_age", "longer", "reward/light"):
        assert f'"{figure}": ' in lines


@pytest.mark.parametrize("kind, settings", [(NFT, Settings), (FlowGRPO, GRPOSettings)])
def test_rewards_that_are_all_equal_change_nothing_under_a_gate(kind, settings):
    backbone = toy()
    algorithm, experience = prepared(backbone, settings(gardo={"diversity": None}), kind, proxy_and_auxiliary())
    experience.scores.rewards[:] = 0.5
    algorithm.judge(experience, World())
    before = {n: p.detach().clone() for n, p in backbone.trainable_parameters.items()}
    optimizer = SAM(backbone.trainable_parameters.values(), torch.optim.SGD, rho=0.1, lr=1.0)
    figures, _ = update(algorithm, optimizer, algorithm.parts(experience, 0), perturbs=True)
    algorithm.after_update(figures)
    assert (figures["equal_groups"], figures["advantage_std"], figures["loss"]) == (2, 0, None)
    assert all(torch.equal(before[n], p) for n, p in backbone.trainable_parameters.items())


def test_a_gate_needs_something_to_go_by():
    backbone = toy()
    for settings, reward, parts in (
        ({}, Channel(0), ("weight 0", "gardo.gate null")),
        ({"gate": {"auxiliaries": ["other"]}}, proxy_and_auxiliary(), ("'other'", "proxy, light")),
        ({"gate": {"signals": {"s1": 1.0}}}, proxy_and_auxiliary(), ("s1", "sharpness")),
    ):
        with pytest.raises(UserError, match=says(*parts)):
            NFT(backbone, reward, Settings(gardo=settings | {"diversity": None}), T)


def test_a_recipe_reads_and_refuses(tmp_path):
    config = load_config(written(tmp_path, "one", "nft"), [])
    assert config.method.gardo.gate.signals.s1 == 0.5 and config.method.uncond == "none"
    with pytest.raises(UserError, match=says("data.group_size", 1, "nft")):
        check_settings(load_config(config, ["data.group_size=1"]), toy())


def test_memory_is_estimated(tmp_path, capsys):
    assert main(["estimate", written(tmp_path, "one", "nft"), "--quick", "--json"]) == 0
    assert "features of pictures" in capsys.readouterr().out
