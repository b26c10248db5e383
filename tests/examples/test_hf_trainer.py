"""A Trainer with the callback equals SAM written by hand over the batches that it saw; it resumes to the bit."""

import pytest
import torch
from builders.messages import says
from torch.nn.functional import cross_entropy

from examples.reference import distance, example, perturbed_gradients, textbook, weights
from examples.test_loops import cosine, numbers
from rsaft_fast.integrations.transformers import SharpnessCallback
from rsaft_fast.optim import SAMAdamW

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*pin_memory"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]

hf = example("hf_trainer")
STEPS, MICRO = 8, 2


def recorded(model) -> list[torch.Tensor]:
    """What comes into the model in training mode, call by call."""
    seen = []

    def record(module, args, kwargs):
        if module.training:
            seen.append(kwargs["input_ids"].cpu())

    model.register_forward_pre_hook(record, with_kwargs=True)
    return seen


def next_token_loss(tokens):
    return lambda model: cross_entropy(model(input_ids=tokens).logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())


def test_it_is_sam_on_the_batches_that_it_saw(tmp_path):
    model = hf.llama()
    seen = recorded(model)
    trainer = hf.trainer_for(model, tmp_path, max_steps=STEPS, max_grad_norm=0.4, logging_steps=1)
    trainer.train()
    calls = [seen[i : i + 2 * MICRO] for i in range(0, len(seen), 2 * MICRO)]
    assert len(seen) == 2 * MICRO * STEPS
    assert all(torch.equal(a, b) for call in calls for a, b in zip(call[:MICRO], call[MICRO:]))  # the batches, again

    steps = [[next_token_loss(torch.cat(call[:MICRO]))] for call in calls]
    truth = hf.llama().double()
    loss, gradients = steps[0][0](truth).item(), perturbed_gradients(truth, steps[0][0], rho=0.05)
    textbook(truth, steps, 0.05, 0.4, lambda step: cosine(step, of=STEPS), lr=5e-3)
    assert distance(model, truth, hf.llama()) < 1e-4  # Llama normalises in float32 whatever its dtype
    logged = trainer.state.log_history[0]
    assert float(logged["loss"]) == pytest.approx(loss, rel=1e-3)  # of the first pass
    norm = torch.cat([g.reshape(-1) for g in gradients]).norm().item()
    assert float(logged["grad_norm"]) == pytest.approx(norm, rel=1e-3)  # of the second, which is what is clipped


def test_it_resumes_to_the_bit(tmp_path):
    whole = hf.llama()
    options = dict(
        max_steps=STEPS, save_steps=STEPS // 2, save_strategy="steps", use_cpu=True
    )  # a GPU's embeddings vary
    hf.trainer_for(whole, tmp_path, **options).train()
    resumed = hf.llama()
    trainer = hf.trainer_for(resumed, tmp_path, **options)
    trainer.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{STEPS // 2}"))
    assert trainer.state.global_step == STEPS
    assert torch.equal(weights(resumed), weights(whole))


def test_without_the_callback_the_first_step_says_so(tmp_path):
    model = hf.llama()
    trainer = hf.trainer_for(model, tmp_path, max_steps=1, save_strategy="no")
    trainer.pop_callback(SharpnessCallback)
    with pytest.raises(RuntimeError, match=says("step()", "perturb()", "step(plain=True)")):
        trainer.train()


def test_an_exception_in_the_second_pass_leaves_the_weights(tmp_path):
    model = hf.llama()
    before = weights(model)
    seen = recorded(model)

    def fail(*_):
        if len(seen) == MICRO + 1:
            raise KeyboardInterrupt

    model.register_forward_pre_hook(fail)
    trainer = hf.trainer_for(model, tmp_path, max_steps=1, save_strategy="no")
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert torch.equal(weights(model), before)
    seen.extend([None] * 9)
    trainer.train()  # and it can be started again
    assert not torch.equal(weights(model), before)


def test_the_trainer_may_build_the_optimizer_itself(tmp_path):
    from transformers import Trainer, TrainingArguments

    model = hf.llama()
    arguments = TrainingArguments(tmp_path, max_steps=2, weight_decay=0.1, report_to="none", save_strategy="no")
    options = (SAMAdamW, {"lr": 1e-3, "rho": 0.05})
    trainer = Trainer(model, arguments, train_dataset=hf.sentences(64, 1), optimizer_cls_and_kwargs=options)
    trainer.add_callback(SharpnessCallback(trainer))
    before = weights(model)
    trainer.train()
    assert not torch.equal(weights(model), before)
    assert sorted(group["weight_decay"] for group in trainer.optimizer.param_groups) == [0.0, 0.1]
    assert "training_step" not in vars(trainer) or trainer.training_step.__func__ is Trainer.training_step


def test_it_learns(capsys):
    hf.main()
    seen = numbers(capsys.readouterr().out)
    assert seen["last"] < 0.6 * seen["first"] and seen["accuracy"] > 0.9
