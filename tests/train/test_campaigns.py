"""Random campaigns against what a run must never lose: kills, failing disks, and several runs in one folder.

Run by hand: `pytest -m campaign`. RSAFT_CAMPAIGN is the number of tries of each (what the default takes: minutes), and
RSAFT_CAMPAIGN_SEED repeats one; both are printed.
"""

from __future__ import annotations

import errno
import os
import random
import shutil
import signal
import time
from pathlib import Path

import pytest
from builders.fork_server import ForkServer
from builders.recipes import Tiny, recipe, write_recipe
from safetensors.torch import load_file

from rsaft_fast.train import checkpoint as checkpoints
from rsaft_fast.train.logging import read_metrics

pytestmark = [
    pytest.mark.campaign,
    pytest.mark.skipif(shutil.which("gcc") is None, reason="needs gcc"),
]

STEPS = 5
SEED = int(os.environ.get("RSAFT_CAMPAIGN_SEED", time.time_ns() % 10**6))
FAULTS = {
    errno.ENOSPC: ("write", "open", "mkdir", "sync"),
    errno.EIO: ("write", "open", "read", "rename", "sync", "mkdir"),
    errno.EACCES: ("open", "read", "rename", "mkdir"),
    errno.EROFS: ("open", "rename", "mkdir"),
    errno.EMFILE: ("open", "read"),
}


def tries(default: int) -> int:
    return int(os.environ.get("RSAFT_CAMPAIGN", default))


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    server = ForkServer(tmp_path_factory.mktemp("server"))
    yield server
    server.close()


@pytest.fixture(scope="module", params=["lora", "full"])
def run(request, tiny, tmp_path_factory, server) -> Run:
    return Run(request.param, tiny, tmp_path_factory.mktemp(request.param), server)


class Run:
    """A recipe, and the run of it that nothing disturbs."""

    def __init__(self, kind: str, tiny: Tiny, folder: Path, server: ForkServer):
        self.server, self.folder, self.number = server, folder, 0
        options = {
            "lora": {"ema": {"decay": 0.9}},
            # The one that ships.
            "full": {
                "parameters": {"train": "full"},
                "backbone": {"path": "playground", "device": "cpu"},
                "reward": {"path": "playground/fair"},
                "data": {"prompts": "playground", "batch_size": 1},
                "optimizer": {"lr": 1e-4},
            },
        }[kind]
        raw = recipe(
            tiny,
            folder / "unbroken",
            max_steps=STEPS,
            checkpoint_every=2,
            samples={"every": 2, "count": 1},
            logging={"tensorboard": True},
            **options,
        )
        self.file = write_recipe(folder / "recipe.yaml", raw)
        self.whole = folder / "unbroken"
        started = time.monotonic()
        child = self.train(self.whole)
        self.seconds = time.monotonic() - started
        assert child.code == 0, child.said

    def new(self) -> Path:
        self.number += 1
        return self.folder / f"try{self.number}"

    def start(self, out: Path, *more: str, faults=None):
        return self.server.start(["train", self.file, f"output_dir={out}", *more], faults)

    def train(self, out: Path, *more: str, faults=None):
        return self.start(out, *more, faults=faults).wait()

    def finish(self, out: Path) -> None:
        """Resume to the end, and find there what the unbroken run has, to the bit; no crumbs."""
        done = self.train(out, "resume=auto")
        assert done.code == 0, done.said
        last, wanted = (folder / "checkpoints" / f"step_{STEPS}" for folder in (out, self.whole))
        assert checkpoints.newest(out / "checkpoints") == (last, [])
        for name in ("weights", "optimizer", "ema"):
            if not (wanted / f"{name}.safetensors").exists():
                continue
            one, two = (load_file(folder / f"{name}.safetensors") for folder in (last, wanted))
            assert one.keys() == two.keys() and all(one[key].equal(two[key]) for key in one), name
        assert (last / "state.json").read_bytes() == (wanted / "state.json").read_bytes()
        assert without_time(out) == without_time(self.whole)
        kept = [p.relative_to(self.whole) for n in ("lora", "transformer") for p in self.whole.glob(f"{n}/*")]
        kept += [p.relative_to(self.whole) for p in self.whole.glob("samples/*")]
        assert len(kept) >= 5
        missing = [p for p in kept if not (out / p).is_file()]
        # A grid whose writing failed was said to be missing; only the last is drawn again.
        assert all(p.parts[0] == "samples" for p in missing) and Path(f"samples/step_{STEPS}.png") not in missing
        assert all((out / p).read_bytes() == (self.whole / p).read_bytes() for p in kept if p not in missing)
        assert not crumbs(out)
        shutil.rmtree(out)


def without_time(out: Path) -> list[dict]:
    return [{k: v for k, v in record.items() if k != "seconds"} for record in read_metrics(out)]


def crumbs(out: Path) -> list[Path]:
    return [path for path in out.rglob("*") if path.name.endswith(".tmp") or path.name == ".lock"]


def test_killed_at_random_moments_again_and_again_a_run_ends_with_the_same_bits(run, capsys):
    rng, kills, runs, wanted = random.Random(SEED), 0, 0, tries(12)
    while kills < wanted:
        out, runs = run.new(), runs + 1
        for _ in range(rng.randint(1, 6)):
            child = run.start(out, "resume=auto")
            time.sleep(rng.uniform(0, run.seconds))
            os.kill(child.pid, signal.SIGKILL)
            kills += child.wait().code == -signal.SIGKILL
            assert child.code in (0, -signal.SIGKILL), child.said
            if child.code == 0:
                break
        run.finish(out)
    with capsys.disabled():
        print(f"\nkill and resume (seed {SEED}): {kills} kills tried in {runs} runs, nothing lost")


def test_whatever_call_fails_a_run_says_one_line_and_can_be_resumed_to_the_same_bits(run, capsys):
    rng, ended, wanted = random.Random(SEED), 0, tries(20)
    totals = {}
    for number, kinds in FAULTS.items():
        out = run.new()
        child = run.train(out, faults={"folder": str(out), "kinds": kinds, "k": 0, "number": 0, "sticky": 0})
        assert child.code == 0 and child.calls > len(kinds), child.said
        totals[number] = child.calls
        shutil.rmtree(out)
    for _ in range(wanted):
        number = rng.choice(list(FAULTS))
        k, sticky, out = rng.randint(1, totals[number]), rng.randint(0, 1), run.new()
        faults = {"folder": str(out), "kinds": FAULTS[number], "k": k, "number": number, "sticky": sticky}
        child = run.train(out, faults=faults)
        what = f"{errno.errorcode[number]} at call {k} of {totals[number]}, sticky {sticky}:\n{child.said}"
        assert "Traceback" not in child.said, what
        errors = [line for line in child.said.splitlines() if line.startswith("rsaft-fast: error:")]
        assert (child.code, len(errors)) in ((0, 0), (2, 1)), what
        if errors:
            ended += 1
            assert os.strerror(number) in errors[0] and str(out) in errors[0], what
        if sticky == 0 or number == errno.ENOSPC:  # a folder that nothing may be done in is not tidied either
            assert not crumbs(out), what
        found, _ = checkpoints.newest(out / "checkpoints")
        assert found is not None or "safe: " not in child.said, what
        run.finish(out)
    with capsys.disabled():
        print(f"\nfailing calls (seed {SEED}): {wanted} tried, {ended} ended the run in a line, nothing lost")


def test_of_runs_begun_at_once_in_one_folder_one_trains_and_the_others_say_who_does(run, capsys):
    rng, rounds, wanted = random.Random(SEED), 0, tries(4)
    for _ in range(wanted):
        out, rounds = run.new(), rounds + 1
        more = rng.choice([(), ("resume=auto",)])
        children = []
        for _ in range(rng.randint(2, 4)):
            children.append(run.start(out, *more))
            time.sleep(rng.choice([0, 0, rng.uniform(0, run.seconds / 4)]))
        trained = [child.pid for child in children if f"{STEPS} updates; the model is in" in child.wait().said]
        assert len(trained) == 1, [child.said for child in children]
        for child in children:
            # One that began when the other had ended finds a run that is over, and holds the folder while it looks.
            others = (other.pid for other in children if other is not child)
            held = any(f"process {pid} on" in child.said for pid in others)
            over = "a run already" in child.said or "updates already" in child.said
            assert child.pid in trained or held or over, child.said
            assert child.code == (2 if held or "a run already" in child.said else 0), child.said
        run.finish(out)
    with capsys.disabled():
        print(f"\nruns in one folder (seed {SEED}): {rounds} rounds tried, each trained once")
