"""A run folder while it is written: what is loaded, drawn, logged and saved, and what is said about it."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from signal import Signals
from typing import Any

import torch

from rsaft_fast.distributed import World
from rsaft_fast.errors import UnreachableError, UserError, describe_error
from rsaft_fast.evaluation.monitors import Drawn
from rsaft_fast.figures.grids import compose_grid
from rsaft_fast.files import describe_io_error
from rsaft_fast.recipe.config import Config
from rsaft_fast.recipe.load import to_yaml
from rsaft_fast.train import checkpoint as checkpoints
from rsaft_fast.train.bar import Progress
from rsaft_fast.train.changes import differing, what_changed
from rsaft_fast.train.evaluations import Evaluations
from rsaft_fast.train.inputs import check_config, has_run
from rsaft_fast.train.loaders import FileLoaders, Loaders
from rsaft_fast.train.logging import (
    BEST,
    CHECKPOINTS,
    CONFIG,
    EVALUATIONS,
    METRICS,
    SAMPLES,
    TENSORBOARD,
    RunLog,
    read_metrics,
    set_aside,
)
from rsaft_fast.train.meter import RUN, Meter
from rsaft_fast.train.signals import StopSignals
from rsaft_fast.train.trackers import TENSORBOARD as BOARD
from rsaft_fast.train.trackers import Tracker
from rsaft_fast.train.trainer import PeerUnreachableError, Trainer, describe_software

Log = Callable[[str], None]
Forecaster = Callable[[Config, Log], Callable[[str], str | None]]
"""Takes the recipe and `log` before anything is loaded; what it returns takes a phase and names keys to change."""


@dataclass(frozen=True)
class Outcome:
    """How a run ended.

    Attributes:
        folder: the run folder.
        step: updates done.
        export: the model for other programs; None when the run was stopped before its last update.
        message: the same in a line for the user.
        stopped_by: the signal that stopped it.
        further: lines about what changed, and what to do next.
    """

    folder: Path
    step: int
    export: Path | None
    message: str
    stopped_by: Signals | None = None
    further: tuple[str, ...] = ()

    @property
    def exit_code(self) -> int:
        """0, or what a shell reports for a process that the signal killed: schedulers and scripts know these."""
        return 0 if self.stopped_by is None else 128 + self.stopped_by


class Run:
    """A run folder being written."""

    def __init__(
        self,
        config: Config,
        log: Log,
        title: str | None = None,
        forecast: Forecaster = lambda config, log: lambda phase: None,
        loaders: Callable[[Config, Log, Log], Loaders] = FileLoaders,
        world: World | None = None,
    ):
        self.config, self.log, self.title, self.forecast, self.loaders = config, log, title, forecast, loaders
        self.world = world or World()
        self.folder = config.run_folder
        self.trainer: Trainer = None  # pyrefly: ignore[bad-assignment]  # from `load` on
        self.resumed: Path | None = None
        self.baseline: torch.Tensor | None = None
        self.latest: torch.Tensor | None = None
        self.evaluations = Evaluations(config, log)
        tensorboard = config.logging.tensorboard or BOARD in config.logging.trackers
        keys = config.model_dump(mode="json")
        trackers: dict[str, Callable[[], Tracker]] = {
            name: partial(Tracker, name, self.folder, keys) for name in config.logging.trackers if name != BOARD
        }
        self.run_log = RunLog(self.folder, tensorboard, log, trackers)
        self.meter: Meter = None  # pyrefly: ignore[bad-assignment]  # from `load` on
        self.progress: Progress = None  # pyrefly: ignore[bad-assignment]  # from `begin` on, unless stopped before it
        self.start = self.saved = 0
        self.complete: Path | None = None
        self._began = time.monotonic()
        self._earlier: list[dict[str, Any]] = []
        self._has_gaps = False
        self._warned = False
        self._skipped = 0

    def __enter__(self) -> Run:
        return self

    def __exit__(self, *exc) -> None:
        try:
            self.run_log.__exit__(*exc)
        finally:
            if self.progress is not None:
                self.progress.close()

    def stage(self, what: str) -> None:
        """Say what begins now, and when."""
        self.log(f"[{time.monotonic() - self._began:4.0f} s] {what}")

    def load(self) -> None:
        """Check the recipe, find what to go on from, load everything.

        Raises:
            UserError: something is wrong with one of them.
        """
        config = self.config
        loaders = self.loaders(config, self.log, self.stage)
        inputs = check_config(config, loaders.own_backbone)
        for note in inputs.notes:
            self.log(note)
        self.resumed = self.complete = inputs.checkpoint
        self._saved = None
        if self.resumed is not None:
            self._saved = checkpoints.read(self.resumed, verify=False)
            self.start = self.saved = self._saved.step
            self._read_earlier(self.resumed)
        advise = self.forecast(config, self.log) if self.world.is_first else lambda phase: None
        self.trainer = Trainer(config, inputs, self.log, self.stage, loaders, self.world)
        self.trainer.advise = advise
        self.evaluations.watch(self.trainer)
        self.meter = Meter(self.trainer.device, describe_software())
        if self._saved is not None and self.resumed is not None:
            self.trainer.check_fit(self._saved, partial(differing, config, self.resumed))
            self.log(f"resuming from {self.resumed}, after update {self.start}")
            changed = what_changed(config, self.resumed, self._saved.info, self.trainer.reward.spec.sha256)
            if changed and self.start >= config.max_steps:
                self.log(
                    f"max_steps is {config.max_steps}: no update is left, and what is otherwise now trains nothing:"
                )
            for line in changed:
                self.log(line)

    def _read_earlier(self, checkpoint: Path) -> None:
        self._earlier = read_metrics(checkpoint.parents[1], self.start, self.log)
        self.evaluations.read(checkpoint.parents[1], self.start, self._earlier)
        missing = self.start - len({record["step"] for record in self._earlier})
        self._has_gaps = missing > 0
        if missing:
            self.log(f"warning: {missing} of the {self.start} updates before have no record in {METRICS}")

    def begin(self, stop: StopSignals) -> None:
        """Go on from the checkpoint, if there is one; the first update is next."""
        self.world.together(lambda: self._agree_on_the_start(self.world.of_first(self.resumed)))
        if self._saved is not None:
            self.trainer.load(self._saved)
            self._saved = None
        if self.world.is_first and self.trainer.step < self.config.max_steps and not stop:
            self.stage(
                f"update {self.trainer.step + 1} of {self.config.max_steps} begins; shown are means over up to 20 "
                f"updates, every figure of each is in {self.folder / METRICS} (eps_norm: length of the weight "
                "perturbation; projection: share of it that rounding leaves)"
            )
            shown, steering = self.trainer.algorithm.shown, self.trainer.steering
            latest = steering.shown if steering is not None else {}
            done, beside = self.trainer.step, self.evaluations.labels
            self.progress = Progress(
                done, self.config.max_steps, self.title, self.log, self._earlier, shown, latest, beside
            )
            self.progress.take_in(self.evaluations.shown)

    def _agree_on_the_start(self, of_first: Path | None) -> None:
        if self.resumed != of_first:
            raise UserError(
                f"resume: this rank goes on from {self.resumed}, and rank 0 from {of_first}: put output_dir on a file "
                "system that all machines share"
            )

    def open(self) -> None:
        """The first thing worth keeping is there: make the run folder."""
        if self.run_log.is_open:
            return
        in_place = self.resumed is not None and self.resumed.parents[1].resolve() == self.folder.resolve()
        aside = None
        if self.resumed is None and has_run(self.folder):
            # What a run left that was ended before its first checkpoint.
            exports = ("lora", self.trainer.backbone.denoiser_name)
            aside = set_aside(self.folder, (METRICS, EVALUATIONS, BEST, CONFIG, SAMPLES, TENSORBOARD, RUN, *exports))
        elif in_place and self._has_gaps:
            aside = set_aside(self.folder, (METRICS,))
        if aside is not None:
            self.log(f"what was there is in {aside} now")
        evaluations = self.evaluations.begin(self.start)
        self.run_log.open(to_yaml(self.config), self.start, self._earlier, evaluations)
        if self.baseline is not None:
            self._log_grid({"before": self.baseline}, 0)

    def iterate(self) -> None:
        """Make an iteration's updates, and note each.

        Raises:
            UnreachableError, PeerUnreachableError: a reward server is gone; what was trained before it went is saved.
        """
        try:
            for record in self.trainer.iterate():
                self.note(record)
        except (UnreachableError, PeerUnreachableError) as error:
            # Pictures are scored before an iteration's first update: the weights are those between two iterations, and
            # all ranks know of it.
            if self.trainer.step > self.saved:
                self.save()
            self.world.gathered(None)  # a launcher ends all as soon as one has ended
            if isinstance(error, PeerUnreachableError):
                raise
            raise UnreachableError(f"{error}; {self.what_is_safe()}; {self.how_to_go_on()}") from error
        except BaseException:
            if self.trainer.optimizer.half_stepped:
                self.roll_back()
            raise

    def note(self, record: dict[str, Any]) -> None:
        """One update's figures, to the log and beside the bar; the first one makes the run folder."""
        if not self.world.is_first:
            return
        self.open()
        self.run_log.metrics(record)
        self.evaluations.note(record)
        self.progress.update(record)
        self._warn(record)

    def is_due(self, every: int) -> bool:
        """Whether something is done after this iteration; everything is after the last."""
        step, before = self.trainer.step, self.trainer.step - self.trainer.algorithm.updates
        return every > 0 and (step // every > before // every or step == self.config.max_steps)

    def owes_a_grid(self) -> bool:
        """Whether the grid after the update that the run goes on from was due and is not there."""
        step = self.trainer.step
        return self.world.of_first(
            step > 0 and self.is_due(self.config.samples.every) and not self.run_log.has_samples(step)
        )

    def owes_an_evaluation(self) -> bool:
        """Whether the evaluation after the update that the run goes on from was due and is not there."""
        step = self.trainer.step
        return self.world.of_first(step > 0 and self.is_due(self.evaluations.every) and self.evaluations.lacks(step))

    def lacks_the_first_evaluation(self) -> bool:
        """Whether there is to be an evaluation of the untrained model, and is none."""
        return self.world.of_first(self.evaluations.lacks(0))

    def draw(
        self, stop: StopSignals, grid: bool, evaluation: bool, when: str | None = None
    ) -> tuple[torch.Tensor | None, Drawn | None]:
        """The pictures of the sample grid and of an evaluation; None of what is not wanted, or when a signal came."""
        if when is not None and (grid or evaluation):
            both = {"the grid": len(self.trainer.sample_prompts) if grid else 0}
            both["the evaluation"] = len(self.trainer.evaluation_prompts) if evaluation else 0
            named = " and ".join(f"{what} {when}: {count} pictures" for what, count in both.items() if count)
            self.stage(f"drawing {named}")
        return self.trainer.draw(grid, evaluation, stop.__bool__)

    def evaluate(self, drawn: Drawn) -> None:
        """Measure the pictures of an evaluation; those of trained weights are worth the run folder."""
        if self.trainer.step > 0 and self.world.is_first:
            self.open()
        self.evaluations.make(self.trainer, drawn, self.run_log)
        if self.progress is not None:
            self.progress.take_in(self.evaluations.shown)

    def log_samples(self, images: torch.Tensor) -> None:
        if not self.world.is_first:
            return
        self.open()
        self.latest = images
        columns = {"before": self.baseline, f"after {self.trainer.step} updates": images}
        self._log_grid(columns, self.trainer.step)

    def _log_grid(self, columns: dict[str, Any], step: int) -> None:
        self.run_log.samples(lambda: compose_grid(self.trainer.sample_prompts, columns), step)

    def save(self) -> None:
        sharded = self.trainer.is_sharded
        if self.world.is_first or sharded:
            self.complete = checkpoints.write(
                self.folder / CHECKPOINTS,
                self.trainer.checkpoint(),
                to_yaml(self.config),
                self._finish_checkpoint,
                self.config.keep_checkpoints,
                self.log,
                self.world if sharded else None,
            )
        self.saved = self.trainer.step

    def _finish_checkpoint(self, folder: Path) -> None:
        """The last thing before it is marked complete: what was logged up to it is on the disk."""
        self.trainer.export_lora(folder)
        self.run_log.flush()

    def roll_back(self) -> None:
        """An update broke off inside its backward pass: leave the model as the last checkpoint has it."""
        if self.complete is None:
            self.log("the update broke off half done, and there is no checkpoint yet: the run starts anew")
            return
        self.trainer.load(checkpoints.read(self.complete, verify=False))
        self.log(
            f"the update broke off half done: back at {self.complete}, after update {self.trainer.step}; resume goes "
            "on there"
        )

    def _warn(self, record: dict[str, Any]) -> None:
        if record["skipped"] > self._skipped:
            self._skipped = record["skipped"]
            self.log(
                f"warning: update {record['step']} was skipped, its gradient is not finite ({self._skipped} so far); "
                "lower optimizer.lr, or compute in fp32"
            )
            return
        projection = record["projection"]
        # Once: rounding can swallow a perturbation, and then the run trains without smoothing.
        if projection is not None and projection < 0.5 and not self._warned:
            self._warned = True
            self.log(
                f"warning: only {projection:.0%} of the weight perturbation survives rounding; train LoRA, use "
                "backbone.dtype=fp32, or raise smoothing.parameters.rho"
            )

    def what_is_safe(self) -> str:
        """What an error leaves."""
        if self.complete is None:
            return "no update of this run is saved yet" if self.run_log.is_open else "nothing was written"
        return f"safe: {self.complete}, after update {self.saved} of {self.config.max_steps}"

    def how_to_go_on(self) -> str:
        """What to do after an error."""
        return "then go on with resume=auto" if self.complete or self.run_log.is_open else "then start again"

    def farewell(self, received: Signals) -> str:
        if not self.run_log.is_open and self.resumed is None:
            return f"stopped by {received.name} before the first update was finished; nothing was written"
        step = self.trainer.step if self.run_log.is_open else self.start
        folder = self.folder if self.run_log.is_open or self.resumed is None else self.resumed.parents[1]
        return f"stopped by {received.name} after update {step} of {self.config.max_steps}; go on with resume={folder}"

    def result(self, export: Path) -> str:
        if self.trainer.halted is not None:
            ended = f"ended after update {self.trainer.step} of {self.config.max_steps}"
            return f"{ended}: {self.trainer.halted}; the model is in {export}"
        if self.start == self.trainer.step:
            return (
                f"the run has {self.trainer.step} updates already, and max_steps is {self.config.max_steps}: raise it "
                f"to train on; the model is in {export}"
            )
        return f"{self.trainer.step} updates; the model is in {export}"

    def changes(self) -> list[str]:
        """What the run changed."""
        lines = []
        if self.baseline is not None and self.latest is not None:
            with suppress(UserError):  # the model is trained and written, whatever its pictures' scores are
                before, after = (self.trainer.grid_reward(images) for images in (self.baseline, self.latest))
                shown = f"the {len(self.latest)} pictures of {self.folder / SAMPLES}"
                lines.append(f"reward of {shown}: {before:.4g} before, {after:.4g} after")
        return lines + self.evaluations.further(self.trainer)

    def reported(self, outcome: Outcome, report: Callable[[Path], list[str]] | None) -> Outcome:
        """Write what the run says of itself, and its page; that they cannot be written is not worth a finished run."""
        if not self.run_log.is_open:
            return outcome
        lines: list[str] = []
        try:
            self.meter.write(self.folder / RUN, resumed=self.resumed is not None)
            if report is not None and outcome.export is not None:
                lines = report(self.folder)
        except Exception as error:
            reason = describe_io_error(error) if isinstance(error, OSError) else describe_error(error)
            self.log(f"warning: the report of the run cannot be written ({reason}); the run itself is whole")
        return replace(outcome, further=(*outcome.further, *lines, *(self._next() if outcome.export else ())))

    def _next(self) -> list[str]:
        """What to do next."""
        sample = f"rsaft-fast sample --run {self.folder} --prompts-file FILE"
        return [
            f"next: rsaft-fast eval {self.folder} --prompts FILE --rewards NAME=PATH    is it better than it was?",
            f"      {sample} --output after",
            f"      {sample} --output before --untrained",
            "      rsaft-fast ab before after    is it better, by your own eyes?",
        ]
