"""What runs of the experiment change of the recipe: smoothings, methods, baselines, controls, other ways to smooth."""

from __future__ import annotations

from dataclasses import dataclass

DRAFT, PLAIN, BOTH = "draft", "plain", "both"


@dataclass(frozen=True)
class Variant:
    """What is changed of the recipe. `$name` stands for the proxy, the judge, or a number that was chosen.

    Attributes:
        overrides: keys that replace the recipe's.
        longer: times as many updates.
        scales: see `Row`.
    """

    overrides: tuple[str, ...]
    longer: int = 1
    scales: tuple[float, ...] = ()


OFF = "smoothing=null"
SMOOTHINGS = {
    PLAIN: Variant((OFF,)),
    "image": Variant(("smoothing.image.radius=$image", "smoothing.parameters=null")),
    "parameter": Variant(("smoothing.image=null", "smoothing.parameters.rho=$rho")),
    BOTH: Variant(("smoothing.image.radius=$image", "smoothing.parameters.rho=$rho")),
}

# One loss for all, so that methods differ in the calls that carry gradient alone. ReFL's hinge, made for ImageReward,
# is past its margin on most of the playground's scores.
_LINEAR = ("loss.map=linear", "loss.scale=1.0")
METHODS = {
    DRAFT: (),
    "refl": ("method.name=refl", *_LINEAR),
    "draft_lv": ("method.name=draft_lv", *_LINEAR),
    "alignprop": ("method.name=alignprop", *_LINEAR),
    "drtune": ("method.name=drtune", *_LINEAR),
}

TRAJECTORIES = {
    name: (f"method.name={name}",) for name in ("leapalign", "flowbp_sparse", "flowbp_bridge", "flowbp_lagrange")
}
"""Methods that choose the gradient's path, too; their loss is the linear one by itself."""

_BOTH_REWARDS = "parts: [{name: clip, path: playground/$proxy}, {name: clip, path: playground/$judge, label: judge}]"
_ENSEMBLE = "parts: [$ensemble]"
_SUM = f"reward={{name: combination, how: weighted, unit_gradients: true, {_BOTH_REWARDS}}}"
_BESIDE = (
    "reward={name: combination, how: weighted, parts: "
    "[{name: clip, path: playground/$proxy}, {name: clip, path: playground/$judge, label: judge, weight: 0}]}"
)
"""The proxy alone is trained on; the judge is only asked where the two disagree."""
_LORA = ("parameters.train=lora", "parameters.lora.rank=8", "optimizer.lr=$lora_lr")
_JUDGES = "judges: {judge: {name: clip, path: playground/$judge}}"
_PATH = (0.25, 0.5, 0.75)
BASELINES = {
    "kl": Variant((OFF, "regularize.kl_to_base=$kl")),
    "small-lr": Variant((OFF, "optimizer.lr=2.0e-5")),
    "twice": Variant((OFF,), longer=2),
    "lora": Variant((OFF, *_LORA), scales=_PATH),
    "interpolated": Variant((OFF,), scales=_PATH),
    "worst": Variant((OFF, f"reward={{name: combination, how: worst, {_ENSEMBLE}}}")),
    "mean-std": Variant((OFF, f"reward={{name: combination, how: mean-std, {_ENSEMBLE}}}")),
    "judge": Variant((OFF, "reward.path=playground/$judge")),
    "sum": Variant((OFF, _SUM)),
    "sum-image": Variant(("smoothing.image.radius=$image", "smoothing.parameters=null", _SUM)),
    "gaussian": Variant(
        (*SMOOTHINGS["image"].overrides, "smoothing.image.kind=gaussian", "smoothing.image.samples=16")
    ),
    "oracle": Variant((OFF, "reward={name: python, path: 'rsaft_fast.playground:true_preference'}")),
}
"""What a practitioner would try instead, of the proxy that is hacked most easily. Early stopping needs no runs of its
own: it is read off the plain ones."""


def _more(kind: str, *overrides: str) -> Variant:
    return Variant((*SMOOTHINGS[kind].overrides, *overrides))


def _steered(kind: str, control: str, *more: str) -> Variant:
    keys = ", ".join((_JUDGES, f"control: {control}", *more))
    return Variant((*SMOOTHINGS[kind].overrides, f"agreement={{{keys}}}"))


CONTROLS = {
    **SMOOTHINGS,
    "judge": BASELINES["judge"],
    "sum": BASELINES["sum"],
    "sum-image": BASELINES["sum-image"],
    "stop": _steered(PLAIN, "stop"),
    "project": _steered(PLAIN, "project"),
    "drop": _steered(PLAIN, "drop", "space: latent"),
    "weight": _steered(PLAIN, "weight", "space: latent"),
    "stop-image": _steered("image", "stop"),
    "project-image": _steered("image", "project"),
    "radius": _steered("image", "radius"),
    "radius-auto": Variant(
        ("smoothing.image.radius=auto", f"smoothing.radius_search={{{_JUDGES}}}", "smoothing.parameters=null")
    ),
}
"""What a held-out reward can be used for: training on it, or the agreement of its gradient with the update's."""

WATCHED = {name: _steered(name, "none") for name in SMOOTHINGS}
"""The smoothings, with the judge's agreement in the log; nothing acts on it, and the weights are the same."""

VARIANTS = {
    "graded-only": _more(BOTH, "smoothing.resample=graded_only"),
    "delta-perturbed": _more(BOTH, "smoothing.delta_from=perturbed"),
    "ascend-loss": _more(BOTH, "smoothing.ascend=loss"),
    "momentum": _more(BOTH, "smoothing.parameters.direction=momentum"),
    "friendly": _more(BOTH, "smoothing.parameters.direction=friendly"),
    "gsam": _more(BOTH, "smoothing.parameters.direction=gsam"),
    "reuse-5": _more(BOTH, "smoothing.parameters.reuse=5"),
    "steps-5": _more("image", "smoothing.image.steps=5"),
    "lowpass": _more("image", "smoothing.image.lowpass=1.0"),
    "annealed": _more("image", "smoothing.image.schedule=linear"),
    "per-sample": _more("image", "smoothing.image.per_sample=s1"),
    "uncertainty": _more("image", "smoothing.image.per_sample=uncertainty", _BESIDE),
    "only-where": _more("image", "smoothing.image.only_where=0.3", _BESIDE),
}
"""Other ways to smooth, at the radii that were chosen for the usual one; of the proxy that is hacked most easily.
LoRA's spaces are a set of their own."""

_SPACES = {
    "factor": ("smoothing.parameters.space=factor",),
    "full": ("smoothing.parameters.space=full",),
    "transferred": ("smoothing.parameters.space=transferred",),
    "bi-lora": ("smoothing.parameters.direction=bi_lora",),
}
_RADII = (0.2, 1.0)
LORA_SPACES = {PLAIN: Variant((OFF, *_LORA))} | {
    f"{name}-{rho:g}": Variant(("smoothing.image=null", f"smoothing.parameters.rho={rho:g}", *keys, *_LORA))
    for name, keys in _SPACES.items()
    for rho in _RADII
}
"""Weight perturbations of LoRA in spaces of their own, in which a radius means another length: each at two. In the
factors it is the length of their own change, elsewhere of the weight's."""
