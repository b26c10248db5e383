"""`rsaft-fast bench`: the passes of a SAM update, ours beside what people use today, on this machine."""

from __future__ import annotations

import argparse
import math
import sys

import torch
from tqdm import tqdm

from rsaft_fast.benchmarks import goals, gpu_memory, speed_tables
from rsaft_fast.benchmarks.providers import EAGER, PROVIDERS, why_missing
from rsaft_fast.benchmarks.results import CPU_NOTE
from rsaft_fast.benchmarks.shapes import CASES, LAYOUTS, check_names, names_in, parameters_of, shapes_of
from rsaft_fast.benchmarks.suite import ALL_CASES, HOST, IMAGES, Job, Suite, device_here, plan, start
from rsaft_fast.errors import UserError

REPEATS, QUICK_REPEATS = 20, 5


def run(arguments: argparse.Namespace) -> int:
    """Run `rsaft-fast bench`."""
    device = device_here()
    if arguments.memory:
        return _memory(arguments)
    if arguments.list:
        print("\n".join(_known(device)))
        return 0
    jobs = _jobs(arguments, device)
    if device.type != "cuda":
        print(f"rsaft-fast: no GPU here. {CPU_NOTE}", file=sys.stderr)
    timer, results = start(device, arguments.results)
    with tqdm(total=len(jobs), unit="list", disable=None, leave=False, dynamic_ncols=True) as bar:
        budget = math.inf if arguments.budget is None else arguments.budget
        suite = Suite(timer, results, budget, QUICK_REPEATS if arguments.quick else REPEATS)
        suite.log = lambda line: tqdm.write(f"rsaft-fast: {line}", file=sys.stderr)
        suite.tick = bar.set_postfix_str
        interrupted = _measure(suite, jobs, bar)
    print(speed_tables.terminal(results.as_dict()))
    if arguments.goals:
        print("\n" + goals.text(results.as_dict()))
    if results.path is not None:
        print(f"\nrsaft-fast: {results.path}")
    for line in suite.failed:
        print(f"rsaft-fast: error: {line}", file=sys.stderr)
    if interrupted:
        print("rsaft-fast: interrupted; what was measured until then is above", file=sys.stderr)
        return 130
    return 1 if suite.failed else 0


def _memory(arguments: argparse.Namespace) -> int:
    """Whole updates at real size, on a GPU."""
    options = ["--runs", arguments.cases or "", "--results", arguments.results or ""]
    options += ["--budget", str(arguments.budget)] if arguments.budget is not None else []
    given = {"--goals": arguments.goals, "--list": arguments.list}
    options += [name for name, wanted in given.items() if wanted]
    return gpu_memory.main(options)


def _measure(suite: Suite, jobs: list[Job], bar: tqdm) -> bool:
    """Measure the jobs; whether Ctrl-C ended it early."""
    try:
        for job in jobs:
            bar.set_description_str(str(job))
            suite.run(job)
            bar.update()
    except KeyboardInterrupt:
        return True
    return False


def _jobs(arguments: argparse.Namespace, device: torch.device) -> list[Job]:
    cases, layouts, providers = (names_in(text) for text in (arguments.cases, arguments.dtypes, arguments.providers))
    check_names(cases, ALL_CASES, "case")
    check_names(layouts, tuple(LAYOUTS), "dtype")
    check_names(providers, (*PROVIDERS, EAGER), "provider")
    jobs = plan(device, cases, layouts, providers, arguments.quick)
    if not jobs:
        raise UserError(
            f"nothing to measure of {', '.join(cases) or 'all'} in {', '.join(layouts) or 'all'}: "
            f"{HOST} is measured in fp32, {IMAGES} in fp32 and bf16"
        )
    return jobs


def _known(device: torch.device) -> list[str]:
    lines = ["cases:"]
    lines += [f"  {case}: {parameters_of(case):,} parameters in {len(shapes_of(case)):,} tensors" for case in CASES]
    lines += [f"  {IMAGES}: the image perturbation", f"  {HOST}: host time of an update of LoRA lists", "dtypes:"]
    lines += [f"  {layout}: {what}" for layout, what in LAYOUTS.items()] + ["providers:"]
    for name, provider in PROVIDERS.items():
        reason = why_missing(name, device, provider.layouts[0])
        lines.append(f"  {name}: {provider.about} [{', '.join(provider.layouts)}]" + (f"; {reason}" if reason else ""))
    return [*lines, f"  {EAGER}: eager torch, for the images"]
