"""A compiled model: the perturbation is written into the weights that its graphs read, and nothing is recompiled.

Inductor needs a C++ compiler on a CPU and Triton on a GPU; aot_eager traces the same graphs and needs neither.

python examples/torch_compile.py [--backend inductor]
"""

import argparse

import torch
from task import batches, network, report
from torch._dynamo.utils import counters
from torch.nn.functional import cross_entropy

from rsaft_fast.optim import SAMAdamW


def main(steps: int = 200, backend: str = "aot_eager", warm_up: int = 2) -> torch.nn.Module:
    model = network()
    compiled = torch.compile(model, backend=backend)
    optimizer = SAMAdamW(model.parameters(), lr=5e-3, rho=0.05, max_grad_norm=0.3)
    losses = []

    def step(x, y):
        loss = cross_entropy(compiled(x), y)
        loss.backward()
        with optimizer.perturbed(zero_grad=True):
            cross_entropy(compiled(x), y).backward()
            optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach())

    counters.clear()
    data = batches(steps)
    for x, y in data[:warm_up]:
        step(x, y)
    with torch.compiler.set_stance("fail_on_recompile"):  # one more compilation would be an error
        for x, y in data[warm_up:]:
            step(x, y)
    report(model, losses, f"{counters['stats']['unique_graphs']} graph compiled by {backend}")
    return model


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--backend", default="aot_eager")
    main(backend=parser.parse_args().backend)
