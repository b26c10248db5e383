"""LeapAlign and FlowBP's surrogates against autograd through their connectors, written out from the equations."""

import numpy as np
import pytest
import torch
from builders.backbones import PROMPTS, cfg, clear_gradients, gradients, make_backbone, noise_source, relative_error
from builders.messages import says
from diffusers import DDIMScheduler

from rsaft_fast.backbones import SD3, SD15
from rsaft_fast.backbones.flow import FlowBackbone
from rsaft_fast.errors import UserError
from rsaft_fast.memory.accounting import saved_tensor_bytes
from rsaft_fast.methods import FlowBPBridge, FlowBPLagrange, FlowBPSparse, LeapAlign
from rsaft_fast.sampling import GradientPlan, backpropagate, rollout
from rsaft_fast.sampling.leaps import line, require_leaps
from rsaft_fast.sampling.linear import LinearStep
from rsaft_fast.sampling.plan import Leap

T, W = 5, 3.0
METHODS = {
    "leapalign": LeapAlign(discount=0.3, similarity=0.05),
    "sparse": FlowBPSparse(k=3, late_bias=1.0, rescale=0.7),
    "bridge": FlowBPBridge(k=4, rescale=0.6, coupling=0.4),
    "lagrange": FlowBPLagrange(order=3, rescale=0.5, support_share=0.25, discount=0.2, similarity=1e-4),
}


class Path:
    """A sampler as Euler's rule z' = z + (u' - u) f, from the noise levels themselves: z = x, u = sigma for a flow,
    z = x / alpha and u = sigma / alpha for DDIM on epsilon."""

    def __init__(self, backbone, schedule):
        self.schedule = schedule
        if isinstance(backbone, FlowBackbone):
            self.alpha, self.u = [1.0] * (T + 1), [step.sigma for step in schedule] + [0.0]
        else:
            last = float(DDIMScheduler.from_config(backbone.pipeline.scheduler.config).final_alpha_cumprod)
            abar = [step.alpha**2 for step in schedule] + [last]
            self.alpha, self.u = [a**0.5 for a in abar], [((1 - a) / a) ** 0.5 for a in abar]

    def latent(self, z, i):
        return self.alpha[i] * z


def quadrature(u, supports, start, stop):
    """Integrals of Lagrange's basis polynomials over [u_start, u_stop]."""
    found = {}
    for i in supports:
        basis = np.poly1d([1.0])
        for q in supports:
            if q != i:
                basis *= np.poly1d([1.0, -u[q]]) / (u[i] - u[q])
        whole = np.polyint(basis)
        found[i] = float(whole(u[stop]) - whole(u[start]))
    return found


def held(f, share):
    """f, of whose gradient `share` passes."""
    return f.detach() + share * (f - f.detach())


class Surrogate:
    """The forward walk under no_grad, with every latent and prediction; and the papers' paths on top of it."""

    def __init__(self, backbone, schedule, latents, conditioning, plan):
        self.backbone, self.conditioning, self.plan = backbone, conditioning, plan
        self.path = Path(backbone, schedule)
        self.x, self.f = [latents], []
        with torch.no_grad():
            for i, step in enumerate(schedule):
                self.f.append(self.predict(self.x[-1], i))
                self.x.append(step.a * self.x[-1] + step.b * self.f[-1])
        self.z = [x / self.path.alpha[i] for i, x in enumerate(self.x)]

    def predict(self, x, i):
        step, conditioning = self.path.schedule[i], self.conditioning
        f = self.backbone.predict(x, step, conditioning.positive)
        if conditioning.negative is None or self.plan.uncond == "none":
            return f
        if self.plan.uncond == "detached":
            with torch.no_grad():
                negative = self.backbone.predict(x, step, conditioning.negative)
        else:
            negative = self.backbone.predict(x, step, conditioning.negative)
        guided = negative + conditioning.guidance_scale * (f - negative)
        if self.backbone.linear_guidance:
            return guided
        # Qwen-Image: each token at its length in the conditional prediction.
        return guided * f.square().sum(-1, keepdim=True).sqrt() / guided.square().sum(-1, keepdim=True).sqrt()

    def shared_input(self, z, i, share):
        return self.path.latent(share * z + (1 - share) * z.detach(), i)

    def leap(self, z, first, start, stop, supports, active, method):
        """One connector from z, whose first prediction is given; its end, and how far it is from the sampler's."""
        w = quadrature(self.path.u, supports, start, stop)
        gain = 1 + method.get("rescale", 0) * (sum(map(abs, w.values())) / sum(abs(w[i]) for i in active) - 1)
        predicted = z
        for i in supports:
            if i == start:
                f = held(first, gain)
            elif i in active:
                f = held(held(self.predict(self.x[i], i), method["support_share"]), gain)
            else:
                f = self.f[i]
            predicted = predicted + w[i] * f
        error = (self.path.latent(self.z[stop] - predicted, stop)).detach().abs().flatten(1).mean(1)
        return predicted + (self.z[stop] - predicted).detach(), error

    def two_leaps(self, k, j, supports, active, discount, tau, **method):
        z_j, d_j = self.leap(self.z[k], self.predict(self.x[k], k), k, j, supports[0], active[0], method)
        f_j = self.predict(self.shared_input(z_j, j, discount), j)
        z_end, d_end = self.leap(z_j, f_j, j, T, supports[1], active[1], method)
        weight = 1 / (d_j.clamp(min=tau) + d_end.clamp(min=tau)) if tau else torch.ones_like(d_j)
        return self.path.latent(z_end, T), weight

    def composed(self, graded, j, coupling, rescale):
        u = self.path.u
        h = [u[i + 1] - u[i] for i in range(T)]
        gain = 1 + rescale * (sum(map(abs, h)) / sum(abs(h[i]) for i in graded) - 1)
        z = self.z[0]
        for i in range(T):
            if i == j:
                z = z + (self.z[j] - z).detach()
                f = held(self.predict(self.shared_input(z, j, coupling), j), gain)
            elif i in graded:
                f = held(self.predict(self.x[i], i), gain)
            else:
                f = self.f[i]
            z = z + h[i] * f
        return self.path.latent(z + (self.z[T] - z).detach(), T), None


def equations(surrogate, name, plan):
    if name == "leapalign":
        k, j = plan.graded
        return surrogate.two_leaps(k, j, [(k,), (j,)], [(k,), (j,)], 0.3, 0.05)
    if name == "lagrange":
        (first, second), graded = plan.leaps, set(plan.graded)
        supports = [first.supports, second.supports]
        active = [tuple(i for i in own if i in graded) for own in supports]
        keys = {"support_share": 0.25, "rescale": 0.5}
        return surrogate.two_leaps(first.start, second.start, supports, active, 0.2, 1e-4, **keys)
    if name == "bridge":
        return surrogate.composed(plan.graded, plan.through[0], 0.4, 0.6)
    return surrogate.composed(plan.graded, None, 0.0, 0.7)


def check(backbone, name, guidance, uncond, seed):
    print("seed", seed)
    plan = METHODS[name].model_copy(update={"uncond": uncond}).draw(T, np.random.default_rng(seed))
    schedule, noise = backbone.schedule(T), noise_source(2, seed)
    latents = backbone.initial_latents(noise)
    conditioning = backbone.encode(PROMPTS[:2], "blurry", **cfg(backbone, guidance))
    clear_gradients(backbone)
    end, weight = equations(Surrogate(backbone, schedule, latents, conditioning, plan), name, plan)
    adjoint = torch.randn(latents.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    scale = torch.ones(2, dtype=torch.float64) if weight is None else weight
    end.backward(adjoint * scale.view(-1, *[1] * (adjoint.ndim - 1)))
    truth = gradients(backbone)

    clear_gradients(backbone)
    trajectory = rollout(backbone, schedule, plan, latents, conditioning, noise)
    assert (trajectory.endpoints[0] - end.detach()).abs().max() <= 1e-12 * end.detach().abs().max()
    if weight is None:
        assert trajectory.similarity is None
    else:
        torch.testing.assert_close(trajectory.similarity, weight, rtol=1e-9, atol=0)
    backpropagate(backbone, trajectory, [adjoint])
    assert relative_error(gradients(backbone), truth) < 1e-9


@pytest.mark.parametrize("uncond", ["graded", "detached", pytest.param("none", marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", METHODS)
def test_surrogates_equal_autograd(backbone64, name, uncond):
    first_of_its_sampler = isinstance(backbone64, (SD15, SD3))
    if not first_of_its_sampler and (uncond != "graded" or name in ("sparse", "lagrange")):
        pytest.skip("tried with the first backbone of this sampler")
    check(backbone64, name, W, uncond, int(np.random.default_rng().integers(1000)))
    if first_of_its_sampler and (uncond, name) == ("graded", "leapalign"):
        check(backbone64, name, 1.0, uncond, int(np.random.default_rng().integers(1000)))


@pytest.mark.parametrize("name", ["leapalign", "bridge"])
def test_surrogates_equal_autograd_with_the_branches_in_one_call(backbone64, name, monkeypatch):
    if not isinstance(backbone64, SD3):
        pytest.skip("tried with one")
    monkeypatch.setattr(backbone64, "cfg_batching", "batched")
    check(backbone64, name, W, "graded", int(np.random.default_rng().integers(1000)))


def test_lagrange_of_order_one_is_leapalign():
    leap = LeapAlign(discount=0.2, similarity=0.3)
    one = FlowBPLagrange(order=1, stretches=None, rescale=0.9, support_share=0.1, discount=0.2, similarity=0.3)
    for seed in range(20):
        a, b = (method.draw(9, np.random.default_rng(seed)) for method in (leap, one))
        assert (a.graded, a.leaps, a.through, a.input_share, a.similarity_floor) == (
            b.graded,
            b.leaps,
            b.through,
            b.input_share,
            b.similarity_floor,
        )


def test_a_leap_through_every_call_of_a_polynomial_is_exact():
    """Of a field that is a polynomial in sigma alone, the quadrature is the integral, whatever the places."""
    rng = np.random.default_rng()
    sigmas = np.sort(rng.uniform(0.02, 1.0, 6))[::-1].tolist() + [0.0]
    steps = tuple(
        LinearStep(t=now, a=1.0, b=after - now, c=0.0, x0_a=1.0, x0_b=-now, alpha=1 - now, sigma=now)
        for now, after in zip(sigmas[:-1], sigmas[1:])
    )
    field = np.poly1d(rng.normal(size=4))  # degree 3
    whole = np.polyint(field)
    own = line(steps, Leap(1, 6, (1, 2, 4, 5)))
    assert sum(w * field(sigmas[i]) for i, w in own.weights.items()) == pytest.approx(
        whole(0.0) - whole(sigmas[1]), rel=1e-9, abs=1e-12
    )
    assert own.slope == 1.0


@pytest.mark.parametrize("family", ["sd3", pytest.param("sd15", marks=pytest.mark.slow)])
def test_peak_activation_memory_is_flat_in_k(family, tmp_path):
    backbone = make_backbone(family, tmp_path / family, train="full")
    schedule = backbone.schedule(9)
    conditioning = backbone.encode(PROMPTS[:2], **cfg(backbone, 3.0))
    peaks = {}
    for method in (
        *(FlowBPSparse(k=k, uncond="graded") for k in (1, 8)),
        LeapAlign(),
        FlowBPBridge(k=6),
        FlowBPLagrange(order=4, active=4),
    ):
        plan, noise = method.draw(9, np.random.default_rng(0)), noise_source(2)
        clear_gradients(backbone)
        with saved_tensor_bytes(ignore=list(backbone.denoiser.parameters())) as account:
            trajectory = rollout(backbone, schedule, plan, backbone.initial_latents(noise), conditioning, noise)
            backpropagate(backbone, trajectory, [torch.ones_like(trajectory.endpoints[0])])
        peaks[method.name, len(plan.graded)] = account.peak
    one = peaks["flowbp_sparse", 1]
    assert one > 40 * backbone.initial_latents(noise_source(2)).nbytes
    assert max(peaks.values()) <= 1.05 * one, peaks


def test_samplers_that_no_leap_can_cross_are_refused(tmp_path):
    backbone = make_backbone("sd15", tmp_path)
    require_leaps(backbone.schedule(T), "leapalign")
    with pytest.raises(UserError, match=says("leapalign", "noise", "sampler.eta=0")):
        require_leaps(backbone.schedule(T, eta=0.5), "leapalign")
    backbone.pipeline.scheduler.register_to_config(prediction_type="v_prediction")
    with pytest.raises(UserError, match=says("flowbp_lagrange", "prediction_type", "flowbp_sparse")):
        require_leaps(backbone.schedule(T), "flowbp_lagrange")
    backbone.pipeline.scheduler.register_to_config(prediction_type="sample")
    require_leaps(make_backbone("sd3", tmp_path / "sd3").schedule(T), "leapalign")


def test_supports_at_one_place_are_refused():
    still = LinearStep(t=1.0, a=1.0, b=0.0, c=0.0, x0_a=1.0, x0_b=-0.5, alpha=0.5, sigma=0.5)
    moving = LinearStep(t=1.0, a=1.0, b=-0.5, c=0.0, x0_a=1.0, x0_b=-0.5, alpha=0.5, sigma=0.5)
    with pytest.raises(UserError, match=says("stands still", (0, 1), "method.order")):
        line((still, moving), Leap(0, 2, (0, 1)))


def test_plans_with_leaps_that_make_no_sense_are_refused():
    leaps = (Leap(1, 3, (1, 2)), Leap(3, 5, (3,)))
    good = dict(num_steps=5, last=4, finish="sampler", graded=(1, 2, 3), through=(3,), leaps=leaps)
    GradientPlan(**good)
    for bad in (
        {"leaps": (leaps[0], Leap(4, 5, (4,)))},
        {"leaps": (leaps[0],)},
        {"graded": (1, 2, 4)},
        {"graded": (2, 3)},
        {"through": (2,)},
        {"finish": "x0"},
        {"leaps": (Leap(1, 3, (2,)), leaps[1])},
        {"leaps": (), "similarity_floor": 0.1},
        {"input_share": 1.5},
        {"rescale": -1.0},
        {"leaps": (), "rescale": 0.5, "last": 3, "graded": (1,), "through": ()},
    ):
        with pytest.raises(UserError):
            GradientPlan(**{**good, **bad})
