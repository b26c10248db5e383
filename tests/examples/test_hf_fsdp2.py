"""A Trainer whose accelerate shards the model by FSDP2, on two ranks, against SAM by hand over the batches of both."""

from __future__ import annotations

import os

import pytest
import torch
from builders.ranks import computed

from examples.reference import distance, example, textbook
from examples.test_hf_trainer import MICRO, next_token_loss, recorded
from examples.test_loops import cosine
from rsaft_fast.integrations.transformers import SharpnessCallback
from rsaft_fast.optim import SAMAdamW

RANKS, STEPS = 2, 6


def trained(rank, folder):
    """Weights, whole, and the tokens of every call."""
    from accelerate import DistributedType, FullyShardedDataParallelPlugin
    from transformers import Trainer, TrainingArguments

    os.environ.update(LOCAL_RANK=str(rank))
    hf = example("hf_trainer")
    model = hf.llama()
    seen = recorded(model)
    options = dict(max_steps=STEPS, max_grad_norm=0.4, use_cpu=True, save_strategy="no", report_to="none")
    options |= dict(gradient_accumulation_steps=MICRO, lr_scheduler_type="cosine", learning_rate=5e-3)
    arguments = TrainingArguments(folder, per_device_train_batch_size=8, disable_tqdm=True, **options)
    # With FSDP the Trainer builds the optimizer itself.
    made = (SAMAdamW, {"lr": 5e-3, "rho": 0.05})
    trainer = Trainer(model, arguments, train_dataset=hf.sentences(512, 1), optimizer_cls_and_kwargs=made)
    trainer.add_callback(SharpnessCallback(trainer))
    # accelerate takes its own FSDP plugin on GPUs alone; gloo shards as well.
    state = trainer.accelerator.state
    state.distributed_type = DistributedType.FSDP
    state.fsdp_plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2,
        reshard_after_forward=True,
        auto_wrap_policy="transformer_based_wrap",
        transformer_cls_names_to_wrap=["LlamaDecoderLayer"],
    )
    trainer.is_fsdp_enabled = True
    trainer.train()
    parameters = dict(trainer.model.named_parameters())
    parted = sum(hasattr(p, "to_local") for p in parameters.values())
    weights = {name: p.full_tensor().detach() for name, p in parameters.items() if hasattr(p, "to_local")}
    return weights, seen, parted


@pytest.mark.slow
def test_a_trainer_in_shards_is_sam_on_the_batches_of_all_ranks(tmp_path):
    ours = computed(RANKS, tmp_path, trained, str(tmp_path))
    weights, _, parted = ours[0]
    model = example("hf_trainer").llama()
    assert parted == len(weights) == len(list(model.parameters()))
    calls = [seen for _, seen, _ in ours]
    assert [len(seen) for seen in calls] == [2 * MICRO * STEPS] * RANKS
    steps = []
    for step in range(STEPS):
        first = range(2 * MICRO * step, 2 * MICRO * step + MICRO)
        assert all(torch.equal(seen[i], seen[i + MICRO]) for seen in calls for i in first)  # the batches, again
        steps.append([next_token_loss(torch.cat([seen[i] for i in first for seen in calls]))])
    truth = example("hf_trainer").llama().double()
    textbook(truth, steps, 0.05, 0.4, lambda step: cosine(step, of=STEPS), lr=5e-3, weight_decay=0.0)
    model.load_state_dict(weights)
    assert distance(model, truth, example("hf_trainer").llama()) < 1e-4
