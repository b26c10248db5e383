"""Data-parallel workers: m-sharpness, SAM on the joint batch, and accelerate, on two processes against float64."""

import os
import subprocess
import sys
import warnings

import pytest
import torch
import torch.distributed as dist
from builders.workers import COUNT, run_workers

from examples.reference import EXAMPLES, distance, example, textbook, weights
from examples.test_hf_trainer import next_token_loss
from examples.test_loops import cosine, numbers, on, task

pytestmark = pytest.mark.slow  # two workers of four scenarios, each importing the libraries

STEPS = 24


def train(rank, sync_first_pass):
    """The example, with a look at its first perturbation and at each reduction."""
    ddp, seen = example("ddp"), {"reductions": 0, "eps": None}

    class Watched(ddp.SAMAdamW):
        def perturb(self, zero_grad=False):
            before = [p.detach().clone() for p in self.param_groups[0]["params"]]
            super().perturb(zero_grad)
            if seen["eps"] is None:
                seen["eps"] = [(p - w).detach() for p, w in zip(self.param_groups[0]["params"], before)]

    class Counted(ddp.DistributedDataParallel):
        def __init__(self, module):
            super().__init__(module)
            self.register_comm_hook(None, self.count)

        @staticmethod
        def count(_, bucket):
            seen["reductions"] += 1
            work = dist.all_reduce(bucket.buffer().div_(COUNT), async_op=True)
            return work.get_future().then(lambda done: done.value()[0])

    ddp.SAMAdamW, ddp.DistributedDataParallel = Watched, Counted
    model = ddp.train(rank, COUNT, sync_first_pass, STEPS)
    return {**seen, "weights": weights(model), "model": model.state_dict()}


def accelerated(rank):
    loop, seen = example("accelerate_loop"), {}

    class Watched(loop.TwoPasses):
        def __init__(self, *args):
            super().__init__(*args)
            seen["replicas"] = self.optimizer.replicas is not None

    loop.TwoPasses = Watched
    model = loop.main(STEPS, cpu=True)
    return {**seen, "weights": weights(model), "model": model.state_dict()}


def trained_by_trainer(rank, folder):
    hf = example("hf_trainer")
    model, seen = hf.llama(), []

    def record(module, args, kwargs):
        if module.training:
            seen.append(kwargs["input_ids"].clone())

    model.register_forward_pre_hook(record, with_kwargs=True)
    options = dict(use_cpu=True, ddp_backend="gloo", ddp_find_unused_parameters=False, save_strategy="no")
    trainer = hf.trainer_for(model, folder, max_steps=6, max_grad_norm=0.4, **options)
    trainer.train()
    return {"weights": weights(model), "model": model.state_dict(), "seen": seen}


def scenarios(rank, folder):
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*workers, and the optimizer")
        return {
            "per worker": train(rank, sync_first_pass=False),
            "synced": train(rank, sync_first_pass=True),
            "accelerate": accelerated(rank),
            "trainer": trained_by_trainer(rank, folder),
        }


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("workers")
    return run_workers(scenarios, folder, str(folder))


def start():
    return task.network().cpu().double()


def data():
    return [(x.cpu().double(), y.cpu()) for x, y in task.batches(STEPS)]


def halves(x, y):
    return [on(*half) for half in zip(x.chunk(COUNT), y.chunk(COUNT))]


def error(ranks, scenario, truth):
    model = task.network()
    model.load_state_dict(ranks[0][scenario]["model"])
    return distance(model, truth, start())


@pytest.mark.parametrize("scenario", ["per worker", "synced", "accelerate", "trainer"])
def test_all_workers_end_at_the_same_weights(ranks, scenario):
    first, second = (rank[scenario]["weights"] for rank in ranks)
    assert torch.equal(first, second)


def test_each_worker_perturbs_by_its_own_gradient(ranks):
    for rank, loss_of in zip(ranks, halves(*data()[0])):
        grads = torch.autograd.grad(loss_of(model := start()), list(model.parameters()))
        g = torch.cat([grad.reshape(-1) for grad in grads])
        eps = torch.cat([e.double().reshape(-1) for e in rank["per worker"]["eps"]])
        assert (eps - 0.05 * g / g.norm()).norm() < 1e-5 * 0.05
    assert not torch.equal(*(rank["per worker"]["eps"][0] for rank in ranks))
    assert torch.equal(*(rank["synced"]["eps"][0] for rank in ranks))


def test_per_worker_it_is_m_sharpness(ranks):
    assert error(ranks, "per worker", textbook(start(), [halves(*batch) for batch in data()], lr=5e-3)) < 1e-5


def test_synced_it_is_sam_on_the_joint_batch(ranks):
    joint = textbook(start(), [[on(*batch)] for batch in data()], lr=5e-3)
    assert error(ranks, "synced", joint) < 1e-5
    assert error(ranks, "per worker", joint) > 1e-3  # the two are not the same


def test_the_first_pass_communicates_only_when_asked(ranks):
    assert [rank["per worker"]["reductions"] for rank in ranks] == [STEPS] * COUNT
    assert [rank["synced"]["reductions"] for rank in ranks] == [2 * STEPS] * COUNT


def test_accelerate_is_m_sharpness_over_its_micro_batches(ranks):
    """accelerate deals batches out in turn: of eight micro-batches of 16 a step, a worker gets every other one."""
    x, y = (torch.cat(parts) for parts in zip(*data()))
    steps = []
    for xs, ys in zip(x.split(8 * 16), y.split(8 * 16)):
        micro = list(zip(xs.split(16), ys.split(16)))
        steps.append([on(*(torch.cat(parts) for parts in zip(*micro[rank::COUNT]))) for rank in range(COUNT)])
    # Its schedulers step once for each process.
    truth = textbook(start(), steps, max_norm=0.3, factor=lambda step: cosine(COUNT * step, of=STEPS), lr=5e-3)
    assert error(ranks, "accelerate", truth) < 1e-5
    assert all(rank["accelerate"]["replicas"] for rank in ranks)


def test_a_trainer_is_m_sharpness_over_its_micro_batches(ranks):
    hf, seen = example("hf_trainer"), [rank["trainer"]["seen"] for rank in ranks]
    steps = [[next_token_loss(torch.cat(calls[i : i + 2])) for calls in seen] for i in range(0, 4 * 6, 4)]
    truth = textbook(hf.llama().double(), steps, 0.05, 0.4, lambda step: cosine(step, of=6), lr=5e-3)
    model = hf.llama()
    model.load_state_dict(ranks[0]["trainer"]["model"])
    assert distance(model, truth, hf.llama()) < 1e-4
    assert not torch.equal(seen[0][0], seen[1][0])  # each had its own batches


TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]


@pytest.mark.parametrize(("launcher", "options"), [([], []), (TORCHRUN, ["--sync-first-pass"])])
def test_the_script_learns(launcher, options):
    command = [sys.executable, *launcher, EXAMPLES / "ddp.py", *options]
    without_gpu = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=without_gpu)
    assert done.returncode == 0, done.stderr
    seen = numbers(done.stdout)
    assert seen["last"] < 0.25 * seen["first"] and seen["accuracy"] > 0.9 and "2 workers" in done.stdout
