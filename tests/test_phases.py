"""Phases are stated where the work is done: whoever calls, and whatever fails, the right one is named."""

import pytest
import torch
from builders.fixtures import out, tiny  # noqa: F401
from builders.recipes import config

from rsaft_fast.algorithms import copies, denoising
from rsaft_fast.errors import UserError
from rsaft_fast.estimate.estimate import estimate
from rsaft_fast.phases import (
    AVERAGING,
    DENOISING,
    GRID,
    REST,
    SAMPLING,
    SCORING,
    current_phase,
    listening,
    phase,
    phase_of,
)
from rsaft_fast.train.inputs import check_config
from rsaft_fast.train.trainer import Trainer


def test_the_outermost_phase_names_the_work_and_the_error():
    told = []
    with pytest.raises(ValueError) as raised, listening(told.append), phase(SAMPLING):
        with phase(SCORING):
            assert current_phase() == SAMPLING
        raise ValueError
    assert current_phase() == REST and phase_of(raised.value) == SAMPLING and told == [SAMPLING, REST]
    assert phase_of(ValueError()) == REST


def test_a_decorated_function_may_call_itself():
    @phase(SCORING)
    def count(n):
        return [current_phase()] + (count(n - 1) if n else [])

    assert count(2) == [SCORING] * 3 and current_phase() == REST


def test_the_estimate_is_the_same_whatever_function_calls_it(tiny, out):  # noqa: F811
    settings = config(tiny, out, samples={"every": 1, "count": 2})

    def step():
        return estimate(settings)

    def sample_images():
        return step()

    def rollout():
        return sample_images()

    def perturb():
        return rollout()

    assert perturb() == estimate(settings)


@pytest.mark.parametrize("where", [AVERAGING, DENOISING, GRID])
def test_a_real_out_of_memory_error_names_its_phase(tiny, out, tmp_path, monkeypatch, where):  # noqa: F811
    """An allocation that no machine has, where the running mean, the denoising loss and the grid allocate."""
    from PIL import Image

    Image.new("RGB", (40, 40)).save(tmp_path / "0.png")
    (tmp_path / "0.txt").write_text("a caption")
    run = Trainer(
        settings := config(
            tiny, out, ema={"decay": 0.9}, denoising={"images": str(tmp_path)}, samples={"every": 1, "count": 1}
        ),
        check_config(settings),
    )

    def too_much(*arguments, **options):
        return torch.empty(2**60, dtype=torch.uint8)

    if where == AVERAGING:
        monkeypatch.setattr(copies.torch, "_foreach_lerp_", too_much)
    elif where == DENOISING:
        monkeypatch.setattr(denoising, "regression_target", too_much)
    else:
        monkeypatch.setattr(type(run.backbone), "decode", too_much)
    with pytest.raises(UserError) as raised:
        run.sample() if where == GRID else run.update()
    assert f"({where})" in str(raised.value) and "Lower the need" in str(raised.value)
    # The running mean and the denoising loss come after the optimizer's step.
    assert ("those before it" in str(raised.value)) == (where == GRID)
