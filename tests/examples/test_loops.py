"""Each example learns, and ends at the weights of the usual SAM arithmetic in float64 on the same data."""

import math
import re

import pytest
import torch
from builders.messages import says
from torch.nn.functional import cross_entropy

from examples.reference import distance, example, textbook, weights

STEPS = 25
ADAMW = dict(lr=5e-3, max_norm=0.3)  # of every example
task = example("task")


def cosine(step, of=STEPS):
    return (1 + math.cos(math.pi * step / of)) / 2


def on(x, y):
    return lambda model: cross_entropy(model(x), y)


def truth(factor=lambda step: 1.0):
    data = [(x.double().cpu(), y.cpu()) for x, y in task.batches(STEPS)]
    return textbook(task.network().double().cpu(), [[on(x, y)] for x, y in data], factor=factor, **ADAMW)


def error(model, factor=lambda step: 1.0) -> float:
    return distance(model, truth(factor), task.network())


def numbers(text: str) -> dict[str, float]:
    """Of the line that an example ends with."""
    first, last, accuracy, chance = re.search(
        r"loss ([\d.]+) -> ([\d.]+), accuracy ([\d.]+) \(by chance ([\d.]+)\)", text.strip().splitlines()[-1]
    ).groups()
    return dict(first=float(first), last=float(last), accuracy=float(accuracy), chance=float(chance))


@pytest.mark.parametrize("name", ["plain_loop", "amp_gradscaler", "gradient_accumulation", "torch_compile"])
def test_it_learns(name, capsys):
    example(name).main()
    seen = numbers(capsys.readouterr().out)
    assert seen["last"] < 0.25 * seen["first"] and seen["accuracy"] > 0.9 > 3 * seen["chance"]


def test_the_plain_loop():
    assert error(example("plain_loop").main(steps=STEPS), cosine) < 1e-5


@pytest.mark.parametrize("micro_batches", [1, 4, 64])
def test_accumulated_micro_batches_are_one_batch(micro_batches):
    assert error(example("gradient_accumulation").main(STEPS, micro_batches)) < 1e-5


def test_a_compiled_model(capsys):
    torch._dynamo.reset()
    assert error(example("torch_compile").main(STEPS)) < 1e-5
    assert "1 graph compiled by aot_eager" in capsys.readouterr().out


def test_a_scaled_run_is_the_unscaled_one():
    start = task.network()
    device = task.DEVICE.type

    def under_autocast(x, y):
        def loss_of(model):
            with torch.autocast(device, torch.float16):
                return cross_entropy(model(x), y)

        return loss_of

    unscaled = textbook(task.network(), [[under_autocast(*batch)] for batch in task.batches(STEPS)], **ADAMW)
    scaled = example("amp_gradscaler").main(STEPS, init_scale=2.0**10)
    # fp16 backward: unscaled, small gradients lose bits, which AdamW enlarges. Both are as near to the truth.
    assert error(scaled) < 2e-3 and distance(scaled, unscaled, start) < 2e-3


def test_a_scale_that_overflows_is_lowered_and_its_steps_are_skipped(capsys):
    model = example("amp_gradscaler").main(5, init_scale=2.0**60)
    assert torch.equal(weights(model), weights(task.network()))  # no step was made, and w is w to the bit
    assert says(f"scale {2**55}", "skipped 5").search(capsys.readouterr().out)
