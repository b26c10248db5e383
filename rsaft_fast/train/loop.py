"""The training loop, from a recipe to a fine-tuned model in a run folder."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from signal import Signals
from typing import Any

import torch
import yaml
from tqdm import tqdm

from rsaft_fast.evaluation import compose_grid
from rsaft_fast.train import checkpoint as checkpoints
from rsaft_fast.train.check import check_config
from rsaft_fast.train.config import Config
from rsaft_fast.train.forecast import announce
from rsaft_fast.train.logging import RunLog, read_metrics
from rsaft_fast.train.recipe import to_yaml
from rsaft_fast.train.signals import StopSignals
from rsaft_fast.train.trainer import Trainer, describe_software

# Keys that may differ after a resume without a word.
_FREE_KEYS = {"resume", "output_dir", "max_steps", "checkpoint_every", "keep_checkpoints", "samples", "logging"}
_FREE_KEYS |= {"data.encoding_cache"}


@dataclass(frozen=True)
class Outcome:
    """How a run ended.

    Attributes:
        folder: the run folder.
        step: updates done.
        export: the model for other programs; None when the run was stopped before its last update.
        message: the same in a line for the user.
        stopped_by: the signal that stopped it.
    """

    folder: Path
    step: int
    export: Path | None
    message: str
    stopped_by: Signals | None = None

    @property
    def exit_code(self) -> int:
        """0, or what a shell reports for a process that the signal killed: schedulers and scripts know these."""
        return 0 if self.stopped_by is None else 128 + self.stopped_by


def train(
    config: Config,
    *,
    say: Callable[[str], None] = lambda line: tqdm.write(line, file=sys.stderr),
    on_samples: Callable[[Trainer, torch.Tensor, int], None] = lambda trainer, images, step: None,
    title: str | None = None,
) -> Outcome:
    """Fine-tune as the recipe says. The run folder appears with the first finished update: what fails before, at a
    missing file or for lack of memory, leaves nothing behind.

    Args:
        say: takes lines for the user.
        on_samples: called with the trainer, each sample grid's pictures, and the updates before them; first with those
            of the untrained model and 0.
        title: of the progress bar.

    Raises:
        UserError: something is wrong with the recipe, its inputs, a reward, or memory.
    """
    inputs = check_config(config)
    for note in inputs.notes:
        say(note)
    forecast = announce(config, say)
    trainer = Trainer(config, inputs, say)
    if forecast is not None:
        trainer.advise = forecast.advise
    saved = checkpoints.read(inputs.checkpoint, verify=False) if inputs.checkpoint else None
    if saved is not None:
        trainer.check_fit(saved)
        say(f"resuming from {inputs.checkpoint}, after update {saved.step}")
        for line in what_changed(config, inputs.checkpoint):
            say(line)
    run = _Run(config, trainer, inputs.checkpoint, say, title)
    with StopSignals() as stop, run:
        # Drawn before a checkpoint is loaded: every grid shows what the model drew before any training.
        run.baseline = run.sample(stop)
        if not stop:
            trainer.check_reward(run.baseline)
        if run.baseline is not None:
            on_samples(trainer, run.baseline, 0)
        if saved is not None:
            trainer.load(saved)
            del saved
        run.begin()
        while trainer.step < config.max_steps and not stop:
            try:
                record = trainer.update()
            except BaseException:
                if trainer.optimizer.half_stepped:
                    run.roll_back()
                raise
            run.note(record)
            if run.is_due(config.samples.every) and (images := run.sample(stop)) is not None:
                run.log_samples(images)
                on_samples(trainer, images, trainer.step)
            if run.is_due(config.checkpoint_every):
                run.save()
        if trainer.step > run.saved:
            run.save()
        if trainer.step < config.max_steps:
            return Outcome(config.run_folder, trainer.step, None, run.farewell(stop.received), stop.received)
        export = trainer.export(config.run_folder)
    return Outcome(config.run_folder, trainer.step, export, run.result(export))


class _Run:
    """A run folder being written."""

    def __init__(
        self, config: Config, trainer: Trainer, resumed: Path | None, say: Callable[[str], None], title: str | None
    ):
        self.config, self.trainer, self.say, self.title = config, trainer, say, title
        self.folder = config.run_folder
        self.resumed = resumed
        self.baseline: torch.Tensor | None = None
        self.log = RunLog(self.folder, config.logging.tensorboard)
        self.bar: tqdm | None = None
        self._warned = False
        self._skipped = 0

    def __enter__(self) -> _Run:
        return self

    def __exit__(self, *exc) -> None:
        try:
            self.log.__exit__(*exc)
        finally:
            if self.bar is not None:
                self.bar.close()

    def begin(self) -> None:
        """Everything is loaded, the first update is next."""
        self.start = self.saved = self.trainer.step
        # On a terminal the bar is there from the start; in a file it begins with the first update.
        if sys.stderr.isatty():
            self.bar = self._new_bar()

    def note(self, record: dict[str, Any]) -> None:
        """One update's figures, to the log and beside the bar; the first one makes the run folder."""
        if not self.log.is_open:
            earlier = read_metrics(self.resumed.parents[1], until=self.start) if self.resumed else []
            self.log.open(to_yaml(self.config), self.start, earlier)
            if self.baseline is not None:
                self._log_grid({"before": self.baseline}, 0)
        self.log.metrics(record)
        self.bar = self.bar or self._new_bar()
        names = {"reward": "reward", "s1": "S1", "eps_norm": "|eps|", "projection": "proj", "seconds": "s/step"}
        shown = {label: f"{record[name]:.4g}" for name, label in names.items() if record[name] is not None}
        self.bar.set_postfix(shown, refresh=False)
        self.bar.update(self.trainer.step - self.bar.n)
        self._warn(record)

    def is_due(self, every: int) -> bool:
        """Whether something is done after this update; everything is after the last."""
        step = self.trainer.step
        return every > 0 and (step % every == 0 or step == self.config.max_steps)

    def sample(self, stop: StopSignals) -> torch.Tensor | None:
        """The sample grid's pictures; None without a grid, or when a signal came meanwhile."""
        return self.trainer.sample(stop.__bool__) if self.config.samples.every else None

    def log_samples(self, images: torch.Tensor) -> None:
        columns = {"before": self.baseline, f"after {self.trainer.step} updates": images}
        self._log_grid(columns, self.trainer.step)

    def _log_grid(self, columns: dict[str, torch.Tensor], step: int) -> None:
        self.log.samples(lambda: compose_grid(self.trainer.sample_prompts, columns), step)

    def save(self) -> None:
        self.checkpoint = checkpoints.write(
            self.folder / "checkpoints",
            self.trainer.checkpoint(),
            to_yaml(self.config),
            self._finish_checkpoint,
            self.config.keep_checkpoints,
        )
        self.saved = self.trainer.step

    def _finish_checkpoint(self, folder: Path) -> None:
        """The last thing before it is marked complete: what was logged up to it is on the disk."""
        self.trainer.export_lora(folder)
        self.log.flush()

    def roll_back(self) -> None:
        """An update broke off inside its backward pass: leave the model as the last checkpoint has it."""
        found, _ = checkpoints.newest(self.folder / "checkpoints")
        found = found or self.resumed
        if found is None:
            self.say("the update broke off half done, and there is no checkpoint yet: the run starts anew")
            return
        self.trainer.load(checkpoints.read(found, verify=False))
        self.say(
            f"the update broke off half done: back at {found}, after update {self.trainer.step}; resume goes on there"
        )

    def _new_bar(self) -> tqdm:
        # A log file needs no ten lines a second.
        return tqdm(
            initial=self.start,
            total=self.config.max_steps,
            desc=self.title,
            unit="update",
            mininterval=0.1 if sys.stderr.isatty() else 5.0,
            dynamic_ncols=True,
        )

    def _warn(self, record: dict[str, Any]) -> None:
        if record["skipped"] > self._skipped:
            self._skipped = record["skipped"]
            self.say(
                f"warning: update {record['step']} was skipped, its gradient is not finite ({self._skipped} so far); "
                "lower optimizer.lr, or compute in fp32"
            )
            return
        projection = record["projection"]
        # Once: rounding can swallow a perturbation, and then the run trains without smoothing.
        if projection is not None and projection < 0.5 and not self._warned:
            self._warned = True
            self.say(
                f"warning: only {projection:.0%} of the weight perturbation survives rounding; train LoRA, use "
                "backbone.dtype=fp32, or raise smoothing.parameters.rho"
            )

    def farewell(self, received: Signals) -> str:
        if not self.log.is_open and self.resumed is None:
            return f"stopped by {received.name} before the first update was finished; nothing was written"
        return (
            f"stopped by {received.name} after update {self.trainer.step} of {self.config.max_steps}; "
            f"go on with resume={self.folder if self.log.is_open else self.resumed.parents[1]}"
        )

    def result(self, export: Path) -> str:
        if not self.log.is_open:
            return (
                f"the run has {self.trainer.step} updates already, and max_steps is {self.config.max_steps}: raise it "
                f"to train on; the model is in {export}"
            )
        return f"{self.trainer.step} updates; the model is in {export}"


def what_changed(config: Config, checkpoint: Path) -> list[str]:
    """Lines about what may keep a resumed run from repeating bit for bit: other settings, other versions."""
    before = yaml.safe_load((checkpoint / "config.yaml").read_text(encoding="utf-8"))
    now = yaml.safe_load(to_yaml(config))
    lines = [
        f"{key} was {_flat(before).get(key)!r} and is {value!r} now"
        for key, value in _flat(now).items()
        if _flat(before).get(key) != value and not _FREE_KEYS & {key, key.partition(".")[0]}
    ]
    info = checkpoints.read_info(checkpoint)
    lines += [
        f"{name} was {info[name]} and is {version} now: the last bits may differ"
        for name, version in describe_software().items()
        if info.get(name, version) != version
    ]
    return lines


def _flat(tree: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(tree, dict):
        return {prefix: tree}
    return {k: v for key, value in tree.items() for k, v in _flat(value, f"{prefix}.{key}" if prefix else key).items()}
