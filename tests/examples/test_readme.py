"""The page's code runs as it stands, and its links lead somewhere."""

import re

import pytest
import torch

from examples.reference import EXAMPLES
from examples.test_loops import task
from rsaft_fast.optim import SAMAdamW

PAGE = (EXAMPLES / "README.md").read_text()
ANSWERS = {}
for section in PAGE.split("\n## ")[1:]:
    for number, block in enumerate(re.findall(r"```python\n(.*?)```", section, re.DOTALL)):
        ANSWERS[f"{section.splitlines()[0]} {number}"] = block


def names() -> dict:
    """What the page takes for granted, after one step."""
    model = torch.nn.Sequential(torch.nn.BatchNorm1d(16), task.network()).to(task.DEVICE)
    optimizer = SAMAdamW(model.parameters())
    micro_batches = task.batches(2)

    def loss_of(model, batch):
        return torch.nn.functional.cross_entropy(model(batch[0]), batch[1])

    loss_of(model, micro_batches[0]).backward()
    with optimizer.perturbed():
        optimizer.step()
    optimizer.zero_grad()
    scaler = torch.amp.GradScaler(task.DEVICE.type, init_scale=128.0)
    few = dict(torch=torch, k=2, step=0, steps=10, batch=micro_batches[0])
    return dict(model=model, optimizer=optimizer, micro_batches=micro_batches, loss_of=loss_of, scaler=scaler, **few)


@pytest.mark.parametrize("answer", [name for name in ANSWERS if "DDP" not in name])  # that is ddp.py
def test_an_answer_runs(answer):
    scope = names()
    before = [p.detach().clone() for p in scope["model"].parameters()]
    exec(ANSWERS[answer], scope)
    assert not scope["optimizer"].is_perturbed
    if "step(" in ANSWERS[answer]:
        assert any(not torch.equal(p, old) for p, old in zip(scope["model"].parameters(), before))


def test_every_other_step_may_be_plain():
    [block] = [block for name, block in ANSWERS.items() if "halve" in name]
    scope = names()
    calls = []
    scope["loss_of"] = lambda model, batch, loss=scope["loss_of"]: calls.append(model) or loss(model, batch)
    for scope["step"] in range(4):
        exec(block, scope)
    assert len(calls) == 6  # 1.5 passes a step


def test_links_and_files():
    anchors = {
        re.sub(r"[^\w\- ]", "", title).lower().replace(" ", "-") for title in re.findall(r"^## (.*)$", PAGE, re.M)
    }
    links = re.findall(r"\]\(#([^)]*)\)", PAGE)
    assert len(links) > 15 and set(links) == anchors
    listed = set(re.findall(r"`(\w+\.py)`", PAGE))
    assert listed == {path.name for path in EXAMPLES.glob("*.py")}
