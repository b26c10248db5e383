import pytest
import torch

from rsaft_fast.methods import AlignProp, DRaFT, ReFL
from rsaft_fast.methods.losses import Loss


@pytest.mark.parametrize(
    "loss, expected",
    [
        (Loss(scale=2.0), lambda r: -2.0 * r),
        (Loss(map="hinge", margin=1.0, scale=0.5), lambda r: 0.5 * max(1.0 - r, 0.0)),
        (Loss(map="target", target=1.5), lambda r: abs(1.5 - r)),
    ],
)
def test_loss_and_derivative(loss, expected):
    rewards = torch.tensor([-3.0, 0.2, 0.9, 1.7, 12.0], dtype=torch.float64)
    values = [expected(float(r)) for r in rewards]
    assert loss(rewards).tolist() == pytest.approx(values)
    slopes = [(expected(float(r) + 1e-6) - expected(float(r) - 1e-6)) / 2e-6 for r in rewards]
    assert loss.derivative(rewards).tolist() == pytest.approx(slopes, abs=1e-6)


def test_authors_losses():
    assert ReFL.default_loss == Loss(map="hinge", margin=2.0, scale=1e-3)
    assert DRaFT.default_loss == Loss()
    assert AlignProp.default_loss.scale == 0.01
