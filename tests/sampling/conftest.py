import pytest
import torch
from builders.backbones import FAMILIES, make_backbone


@pytest.fixture(scope="session", params=FAMILIES)
def backbone64(request, tmp_path_factory):
    """A tiny float64 backbone with LoRA whose B is not zero, so that every gradient is alive."""
    return make_backbone(request.param, tmp_path_factory.mktemp(request.param), dtype=torch.float64)
