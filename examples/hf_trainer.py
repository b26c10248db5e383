"""A transformers Trainer: SAMAdamW as its optimizer, and a callback that makes each of its steps a two-pass step.

Accumulation, clipping (``max_grad_norm`` clips the second pass's gradient), the schedule, checkpoints and resuming
stay the Trainer's. The model is a Llama of random weights; it learns to count: each token is the last one times 3, plus
1, modulo 16, with errors in the training data.

python examples/hf_trainer.py
"""

import tempfile

import torch
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

from rsaft_fast.integrations.transformers import SharpnessCallback
from rsaft_fast.optim import SAMAdamW


def sentences(count: int, seed: int, errors: float = 0.0) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    columns = [torch.randint(16, (count,), generator=generator)]
    for _ in range(11):
        columns.append((3 * columns[-1] + 1) % 16)
    tokens = torch.stack(columns, 1)
    wrong = torch.rand(tokens.shape, generator=generator) < errors
    tokens[wrong] = torch.randint(16, tokens.shape, generator=generator)[wrong]
    return [{"input_ids": row, "labels": row} for row in tokens]


def llama() -> torch.nn.Module:
    torch.manual_seed(0)
    sizes = dict(vocab_size=16, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64)
    return LlamaForCausalLM(LlamaConfig(**sizes))


def trainer_for(model: torch.nn.Module, output_dir: str, **options) -> Trainer:
    defaults = dict(max_steps=80, per_device_train_batch_size=16, gradient_accumulation_steps=2, max_grad_norm=1.0)
    defaults |= dict(lr_scheduler_type="cosine", logging_steps=20, report_to="none", disable_tqdm=True)
    arguments = TrainingArguments(output_dir, **{**defaults, **options})
    optimizer = SAMAdamW(model.parameters(), lr=5e-3, rho=0.05)
    trainer = Trainer(model, arguments, train_dataset=sentences(4096, 1, errors=0.1), optimizers=(optimizer, None))
    trainer.add_callback(SharpnessCallback(trainer))
    return trainer


def main(**options) -> torch.nn.Module:
    model = llama()
    with tempfile.TemporaryDirectory() as folder:
        trainer = trainer_for(model, folder, save_strategy="no", **options)
        trainer.train()
        held_out = trainer.predict(sentences(200, seed=2))
    losses = [float(row["loss"]) for row in trainer.state.log_history if "loss" in row]
    right = held_out.predictions.argmax(-1)[:, :-1] == held_out.label_ids[:, 1:]
    print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f}, accuracy {right.mean():.3f} (by chance 0.06)")
    return model


if __name__ == "__main__":
    main()
