"""A reward server that dies in an iteration ends all ranks alike: saved, one line, and the run goes on to its bits."""

from __future__ import annotations

import signal
import socket
import threading
import time
from contextlib import ExitStack

import pytest
from builders.many import largest_difference, records
from builders.ranks import Ranks
from builders.recipes import recipe, write_recipe
from builders.reward_server import TOKEN, Mean, serving

from rsaft_fast.cli import main
from rsaft_fast.rewards import wire


class Dying(Mean):
    """Gone from its third iteration on: of eight pictures each, some are scored first."""

    def __init__(self):
        super().__init__()
        self.dying = threading.Event()

    def score(self, images, prompts):
        if sum(self.calls) >= 18:
            self.dying.set()
            time.sleep(1)
        return super().score(images, prompts)


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["replicate", "shard"])
def test_a_server_that_dies_ends_all_ranks_saved_and_the_run_goes_on(tiny, tmp_path, monkeypatch, strategy):
    monkeypatch.setenv(wire.TOKEN_VARIABLE, TOKEN)
    prompts, whole, broken = tmp_path / "prompts.txt", tmp_path / "whole", tmp_path / "broken"
    prompts.write_text("1\n2\n3\n")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    reward = {"name": "remote", "path": f"http://127.0.0.1:{port}", "patience": 0.75}
    keys = {"max_steps": 6, "checkpoint_every": 100, "method": {"name": "flow_grpo", "updates": 2}, "reward": reward}
    keys |= {"data__prompts": str(prompts), "data__group_size": 2, "data__prompts_per_iteration": 4}
    keys |= {"distributed": {"strategy": strategy, "timeout": 60}, "smoothing": None, "sharpness": None}
    keys |= {"parameters__train": "full" if strategy == "shard" else "lora", "report": False, "sampler__steps": 3}

    def started(folder, *more):
        """Ranks that begin when the server does: they must not hold its socket."""
        path = write_recipe(tmp_path / f"{folder.name}.yaml", recipe(tiny, folder, "sd3", **keys))
        gate = tmp_path / f"gate {time.monotonic()}"

        def action():
            while not gate.exists():
                time.sleep(0.05)
            return main(["train", str(path), *more])

        return Ranks(2, tmp_path / f"logs {gate.name}", action), gate

    ranks, gate = started(whole)
    with serving({"mean": Mean()}, port=port):
        gate.touch()
        assert ranks.wait() == [0, 0], ranks.said(0) + ranks.said(1)

    ranks, gate = started(broken)
    reward, server = Dying(), ExitStack()
    server.enter_context(serving({"mean": reward}, port=port))
    gate.touch()
    assert reward.dying.wait(120), ranks.said(0)
    server.close()
    codes = ranks.wait(40)
    assert -signal.SIGKILL not in codes and codes == [2, 2], codes
    errors = [line for rank in (0, 1) for line in ranks.said(rank).splitlines() if "rsaft-fast: error: " in line]
    assert len(errors) == 1, errors
    assert all(word in errors[0] for word in (f"127.0.0.1:{port}", "tries", "step_4", "of 6", "resume=auto")), errors
    assert [path.name for path in (broken / "checkpoints").iterdir()] == ["step_4"]

    ranks, gate = started(broken, "resume=auto")
    with serving({"mean": Mean()}, port=port):
        gate.touch()
        assert ranks.wait() == [0, 0], ranks.said(0)
    assert [record["step"] for record in records(broken)] == list(range(1, 7))
    assert largest_difference(whole, broken, 6) == 0
