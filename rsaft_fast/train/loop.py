"""The training loop, from a recipe to a fine-tuned model in a run folder."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import torch

from rsaft_fast.distributed import World
from rsaft_fast.errors import UserError
from rsaft_fast.files import check_writable, describe_io_error, mend_of
from rsaft_fast.lock import sole_writer
from rsaft_fast.progress import tell
from rsaft_fast.recipe.config import Config
from rsaft_fast.train.loaders import FileLoaders, Loaders
from rsaft_fast.train.run import Forecaster, Log, Outcome, Run
from rsaft_fast.train.signals import Interrupted, StopSignals
from rsaft_fast.train.trainer import Trainer


def train(
    config: Config,
    *,
    log: Log = tell,
    on_samples: Callable[[Trainer, torch.Tensor, int], None] = lambda trainer, images, step: None,
    title: str | None = None,
    forecast: Forecaster = lambda config, log: lambda phase: None,
    loaders: Callable[[Config, Log, Log], Loaders] = FileLoaders,
    report: Callable[[Path], list[str]] | None = None,
    world: World | None = None,
) -> Outcome:
    """Fine-tune as the recipe says.

    The run folder appears with the first finished update: what fails before, at a missing file or for lack of memory,
    leaves nothing behind. Until the end no other process trains in it.

    Args:
        log: takes lines for the user.
        on_samples: called with the trainer, each sample grid's pictures, and the updates before them; first with those
            of the untrained model and 0.
        title: of the progress bar.
        forecast: says what the run will need, and returns what lowers the need of a phase that ran out of memory.
        loaders: makes where models come from, of the recipe, `log`, and what takes a line about each stage.
        report: writes the page of a finished run's folder, where the recipe has `report`, and returns lines about it.
        world: this rank among those that train together, each of which calls this; rank 0 alone writes and talks.

    Raises:
        UserError: something is wrong with the recipe, its inputs, a reward, memory or a disk, or another process trains
            in the run folder.
        PeerError, LostRankError: another rank could not go on.
        Interrupted: a second signal, at once.
    """
    world = world or World()
    log = log if world.is_first else lambda line: None
    with StopSignals(world) as stop, _in_one_line(run := Run(config, log, title, forecast, loaders, world)):
        stop.finishing = None
        try:
            with ExitStack() as lock:
                with ExitStack() as opened:
                    world.together(lambda: _begin(config, run, lock, opened))
                    with run.meter.running():
                        outcome = _train(config, run, stop, on_samples)
                # Now all is on the disk.
                stop.finishing = "the report is being written"
                return run.reported(outcome, report if config.report else None)
        except Interrupted as interrupted:
            if stop.finishing is not None:
                raise
            # While it was loading: there was nothing to finish.
            return Outcome(config.run_folder, run.start, None, run.farewell(interrupted.signal), interrupted.signal)


def _begin(config: Config, run: Run, lock: ExitStack, opened: ExitStack) -> None:
    """Take the run folder, for as long as `lock` is open, and load everything, to be closed with `opened`."""
    check_writable(config.run_folder)
    if run.world.is_first:
        lock.enter_context(sole_writer(config.run_folder, "output_dir", run.log))
    opened.enter_context(run)
    run.load()


def _train(config: Config, run: Run, stop: StopSignals, on_samples: Callable) -> Outcome:
    trainer = run.trainer
    stop.finishing = "finishing the batch of pictures"
    # Drawn before a checkpoint is loaded: every grid shows what the model drew before any training.
    run.baseline, drawn = run.draw(
        stop, config.samples.every > 0, run.lacks_the_first_evaluation(), "of the untrained model"
    )
    if not stop.agree():
        run.world.together(lambda: trainer.check_reward(run.baseline))
    if run.baseline is not None:
        on_samples(trainer, run.baseline, 0)
    if drawn is not None and not stop:
        run.evaluate(drawn)
    run.begin(stop)

    def look(grid: bool, evaluation: bool, what: str | None = None) -> None:
        images, drawn = run.draw(stop, grid, evaluation, what)
        if images is not None:
            run.log_samples(images)
            on_samples(trainer, images, trainer.step)
        if drawn is not None and not stop:
            run.evaluate(drawn)

    # A run that was stopped in an update has not drawn the pictures after it.
    if not stop:
        look(run.owes_a_grid(), run.owes_an_evaluation(), f"after update {trainer.step}, not there yet")
    while trainer.step < config.max_steps and not stop.agree() and trainer.halted is None:
        stop.finishing = f"finishing update {trainer.step + trainer.algorithm.updates}, then saving"
        run.iterate()
        if trainer.halted is not None:
            break
        look(run.is_due(config.samples.every), run.is_due(run.evaluations.every))
        if run.is_due(config.checkpoint_every):
            run.save()
    if trainer.step > run.saved:
        run.save()
    if stop and stop.received is not None and trainer.step < config.max_steps:
        return Outcome(config.run_folder, trainer.step, None, run.farewell(stop.received), stop.received)
    if trainer.halted is not None and trainer.step == 0:
        return Outcome(config.run_folder, 0, None, f"ended before the first update: {trainer.halted}")
    stop.finishing = "the model is being written"
    export = trainer.export(config.run_folder) if run.world.is_first or trainer.is_sharded else None
    changes = run.changes() if run.world.is_first else []
    if config.shares_rewards(run.world.size):
        run.world.gathered(None)  # till then the others lend rank 0 their parts of the reward
    if export is None or not run.world.is_first:
        return Outcome(config.run_folder, trainer.step, None, "rank 0 writes the model")
    return Outcome(config.run_folder, trainer.step, export, run.result(export), further=tuple(changes))


@contextmanager
def _in_one_line(run: Run) -> Iterator[None]:
    """An I/O error is an error like others: path, reason, what is safe, and how to go on."""
    try:
        yield
    except OSError as error:
        raise UserError(
            f"{describe_io_error(error)}; {run.what_is_safe()}; {mend_of(error)}, {run.how_to_go_on()}"
        ) from error
