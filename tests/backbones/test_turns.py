"""Text encoders that take turns give the bits that they give together, and each is on the device alone."""

from __future__ import annotations

import pytest
import torch
from builders.backbones import BUILDERS, FAMILIES, PROMPTS, SIZE
from builders.messages import says
from builders.pipelines import tiny_sd3

from rsaft_fast.backbones import load_backbone, turns
from rsaft_fast.backbones.turns import encode_in_turns, visiting
from rsaft_fast.errors import UserError
from rsaft_fast.estimate.live import LiveBytes

TEXTS = [*PROMPTS, None, "a red circle"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    folder = tmp_path_factory.mktemp("turns")
    return {name: build(folder / name) for name, build in BUILDERS.items()} | {
        "sd3 without T5": tiny_sd3(folder / "sd3-2", with_t5=False)
    }


@pytest.fixture(params=["on the host", "as if the device were another"])
def where(request, monkeypatch):
    if request.param != "on the host":
        monkeypatch.setattr(turns, "_is_host", lambda device: False)
    monkeypatch.setattr(turns, "BLOCK", 4)


@pytest.mark.usefixtures("where")
@pytest.mark.parametrize("family", [*FAMILIES, "sd3 without T5"])
def test_turns_give_the_bits_of_all_at_once(folders, family):
    together = load_backbone(folders[family], height=SIZE, width=SIZE)
    apart = load_backbone(folders[family], height=SIZE, width=SIZE, networks=False)
    rows = list(encode_in_turns(apart, TEXTS))
    assert len(rows) == len(TEXTS)
    for text, row in zip(TEXTS, rows):
        expected = together.embed_text([text])
        assert row.keys() == expected.keys()
        assert all(torch.equal(row[name], expected[name]) for name in row)


@pytest.mark.parametrize("family", FAMILIES)
def test_parts_are_shapes_alone_where_they_are_not_loaded(folders, family):
    whole = load_backbone(folders[family], height=SIZE, width=SIZE)
    shapes = load_backbone(folders[family], height=SIZE, width=SIZE, text=False, networks=False)
    assert all(parameter.is_meta for module in shapes.modules() for parameter in module.parameters())
    for network in ("denoiser", "vae"):
        of = lambda b: b.denoiser if network == "denoiser" else b.pipeline.vae  # noqa: B023, E731
        assert {n: p.shape for n, p in of(whole).named_parameters()} == {
            n: p.shape for n, p in of(shapes).named_parameters()
        }
    assert shapes.embedding_shapes == whole.embedding_shapes and shapes.latent_shape == whole.latent_shape
    assert shapes.schedule(3) == whole.schedule(3)
    without_text = load_backbone(folders[family], height=SIZE, width=SIZE, text=False)
    with pytest.raises(UserError, match=says("prompts", "text_encoder")):
        list(encode_in_turns(without_text, ["one"]))


def test_visitors_go_home_and_leave_nothing_also_after_an_error(folders, monkeypatch):
    monkeypatch.setattr(turns, "_is_host", lambda device: False)
    backbone = load_backbone(folders["sd3"], networks=False)
    names = backbone.text_encoder_names()
    encoders = [getattr(backbone.pipeline, name) for name in names]
    before = [[tensor.data_ptr() for tensor in encoder.parameters()] for encoder in encoders]
    live = LiveBytes("cpu")
    live.exclude(tensor for encoder in encoders for tensor in (*encoder.parameters(), *encoder.buffers()))

    def exhausted(*args, **options):
        raise torch.OutOfMemoryError("no memory")

    with live:
        with visiting(encoders[2], torch.device("cpu")):
            assert live.alive >= sum(p.numel() * 4 for p in encoders[2].parameters())
            assert encoders[2].shared.weight.data_ptr() != before[2][0]
        assert live.alive == 0
        monkeypatch.setattr(type(encoders[2]), "forward", exhausted)
        with pytest.raises(torch.OutOfMemoryError):
            list(encode_in_turns(backbone, ["one"]))
    assert [[tensor.data_ptr() for tensor in encoder.parameters()] for encoder in encoders] == before
    assert not any("forward" in vars(encoder) for encoder in encoders)


@pytest.mark.gpu
@pytest.mark.parametrize("family", FAMILIES)
def test_on_a_gpu_they_come_and_go(folders, family):
    together = load_backbone(folders[family], height=SIZE, width=SIZE, device="cuda")
    expected = [together.embed_text([text]) for text in TEXTS]
    apart = load_backbone(folders[family], height=SIZE, width=SIZE, device="cuda", networks=False)
    encoders = [module for module in apart.modules() if not next(module.parameters()).is_meta]
    assert encoders and all(p.device.type == "cpu" for module in encoders for p in module.parameters())
    before = torch.cuda.memory_allocated()
    for row, other in zip(encode_in_turns(apart, TEXTS), expected):
        assert all(t.device.type == "cpu" and torch.equal(t, other[name].cpu()) for name, t in row.items())
    assert torch.cuda.memory_allocated() == before
    assert all(p.device.type == "cpu" for module in encoders for p in module.parameters())
