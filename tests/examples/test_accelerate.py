"""The accelerate loop against float64, and what `TwoPasses` promises: when to step, what an exception leaves."""

import subprocess
import sys

import pytest
import torch
from builders.messages import says
from torch.nn.functional import cross_entropy

from examples.reference import distance, example, weights
from examples.test_loops import STEPS, cosine, error, numbers, task
from rsaft_fast.integrations.accelerate import TwoPasses, unwrapped
from rsaft_fast.optim import SAM, SAMAdamW

accelerate = pytest.importorskip("accelerate")


@pytest.fixture(autouse=True)
def fresh_state():
    """accelerate keeps its settings for the whole process."""
    yield
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
    accelerate.state.GradientState._reset_state()


@pytest.mark.parametrize("micro_batches", [1, 4])
def test_the_loop(micro_batches):
    assert error(example("accelerate_loop").main(STEPS, micro_batches), cosine) < 1e-5


def test_it_learns(capsys):
    example("accelerate_loop").main()
    seen = numbers(capsys.readouterr().out)
    assert seen["last"] < 0.25 * seen["first"] and seen["accuracy"] > 0.9


def prepared(micro_batches=2, make=SAMAdamW):
    accelerator = accelerate.Accelerator(gradient_accumulation_steps=micro_batches)
    model = task.network()
    model, optimizer = accelerator.prepare(model, make(model.parameters(), rho=0.5))
    passes = TwoPasses(accelerator, model, optimizer)

    def forward_backward(x, y):
        loss = cross_entropy(model(x), y)
        accelerator.backward(loss)
        return loss.item()

    return accelerator, model, optimizer, passes, forward_backward


def test_a_step_that_the_loop_passes_over_leaves_the_next_first_pass_at_the_weights():
    _, model, optimizer, passes, forward_backward = prepared(1)
    first, second = task.batches(2)
    at_weights = cross_entropy(model(second[0]), second[1]).item()
    passes(forward_backward, *first)
    assert passes.optimizer.is_perturbed  # and no optimizer.step(), for a loss that is not finite, say
    optimizer.zero_grad()
    assert passes(forward_backward, *second) == at_weights
    optimizer.step()


@pytest.mark.parametrize("make", [SAMAdamW, lambda params, **o: SAM(params, torch.optim.SGD, lr=0.1, **o)])
def test_only_a_complete_step_perturbs_and_updates(make):
    accelerator, model, optimizer, passes, forward_backward = prepared(2, make)
    assert passes.optimizer is unwrapped(optimizer) is not optimizer
    before, updated = weights(model), []
    for batch in task.batches(4):
        with accelerator.accumulate(model):
            at_weights = cross_entropy(model(batch[0]), batch[1]).item()
            assert passes(forward_backward, *batch) == at_weights  # the first pass's loss
            assert passes.optimizer.is_perturbed is accelerator.sync_gradients
            optimizer.step()
            optimizer.zero_grad()
        updated.append(not torch.equal(weights(model), before))
        before = weights(model)
    assert updated == [False, True, False, True] and int(passes.optimizer.skipped) == 0


@pytest.mark.parametrize("failing_call", [2, 3, 4])  # calls 1 and 2 are the first pass, 3 and 4 the second
def test_an_exception_in_either_pass_drops_the_step_and_nothing_else(failing_call):
    accelerator, model, optimizer, passes, forward_backward = prepared(2)
    before, calls = weights(model), []

    def failing(x, y):
        calls.append(x)
        if len(calls) == failing_call:
            raise MemoryError("no room for this micro-batch")
        return forward_backward(x, y)

    def step(function, data):
        for batch in data:
            with accelerator.accumulate(model):
                passes(function, *batch)
                optimizer.step()
                optimizer.zero_grad()

    with pytest.raises(MemoryError):
        step(failing, task.batches(2))
    assert torch.equal(weights(model), before) and not passes.optimizer.is_perturbed
    assert all(p.grad is None for p in model.parameters())
    again = task.batches(2, seed=3)
    step(forward_backward, again)  # a whole step, of these two micro-batches only

    alone = task.network()
    expected = SAMAdamW(alone.parameters(), rho=0.5)
    x, y = (torch.cat(parts) for parts in zip(*again))
    cross_entropy(alone(x), y).backward()
    with expected.perturbed(zero_grad=True):
        cross_entropy(alone(x), y).backward()
        expected.step()
    assert (weights(model) - weights(alone)).norm() < 1e-4 * (weights(alone) - before).norm()


def test_a_scaler_of_accelerate_changes_nothing():
    """accelerate hands the optimizer to its GradScaler, behind a step of its own."""
    ended = []
    for scaler in (None, torch.amp.GradScaler("cpu", init_scale=1024.0)):
        accelerator = accelerate.Accelerator(gradient_accumulation_steps=2, cpu=True)
        accelerator.scaler = scaler
        model = task.network().cpu()
        model, optimizer = accelerator.prepare(model, SAMAdamW(model.parameters(), lr=5e-3, rho=0.5))
        passes = TwoPasses(accelerator, model, optimizer)

        def forward_backward(x, y, model=model, accelerator=accelerator):
            accelerator.backward(cross_entropy(model(x), y))

        for x, y in task.batches(8):
            with accelerator.accumulate(model):
                passes(forward_backward, x.cpu(), y.cpu())
                optimizer.step()
                optimizer.zero_grad()
        ended.append(model)
    assert scaler.get_scale() == 1024.0 and int(passes.optimizer.skipped) == 0
    assert distance(ended[1], ended[0], task.network()) < 1e-5


def test_released_gradients_and_their_half_step():
    ended = []
    for release in (False, True):
        accelerator, model, optimizer, passes, forward_backward = prepared(
            1, lambda params, release=release, **o: SAMAdamW(params, release_gradients=release, **o)
        )
        for x, y in task.batches(3):
            with accelerator.accumulate(model):
                passes(forward_backward, x, y)
                optimizer.step()
                optimizer.zero_grad()
        ended.append(weights(model))
    assert torch.equal(*ended)

    def out_of_memory(_):
        if passes.optimizer.is_perturbed:
            raise MemoryError("no room for this gradient")

    model[0].weight.register_hook(out_of_memory)  # the last to get its gradient
    with pytest.raises(MemoryError), accelerator.accumulate(model):
        passes(forward_backward, x, y)
    assert passes.optimizer.half_stepped


def test_nothing_is_imported_for_those_who_do_not_use_it():
    code = """
import sys, rsaft_fast.optim, rsaft_fast.integrations, rsaft_fast.integrations.accelerate
print(*{"accelerate", "transformers", "diffusers"} & set(sys.modules))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout.strip()) == (0, ""), done.stderr


def test_another_optimizer_is_refused():
    accelerator = accelerate.Accelerator()
    model, optimizer = task.network(), None
    model, optimizer = accelerator.prepare(model, torch.optim.AdamW(model.parameters()))
    with pytest.raises(TypeError, match=says("AdamW", "SAM", "SAMAdamW", "rsaft_fast.optim")):
        TwoPasses(accelerator, model, optimizer)
