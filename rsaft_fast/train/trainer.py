"""A recipe's objects, loaded and ready: an update, a sample grid, a checkpoint, an export."""

from __future__ import annotations

import math
import platform
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from rsaft_fast import __version__
from rsaft_fast.algorithms.ascent import KEPT
from rsaft_fast.algorithms.auxiliary import AuxiliaryAdapter
from rsaft_fast.algorithms.copies import MEAN, load_parts
from rsaft_fast.algorithms.update import update
from rsaft_fast.backbones import save_lora
from rsaft_fast.data.encodings import free_memory
from rsaft_fast.distributed import World
from rsaft_fast.distributed.shards import as_parts, like, local, local_parts, whole_on_host
from rsaft_fast.distributed.world import PeerError
from rsaft_fast.errors import UnreachableError, UserError
from rsaft_fast.evaluation.monitors import Drawn
from rsaft_fast.files import io_errors_of, remove_tree, replace_folder
from rsaft_fast.out_of_memory import oom_as_user_error
from rsaft_fast.phases import GRID, phase
from rsaft_fast.progress import watched
from rsaft_fast.recipe.config import Config
from rsaft_fast.sampling.pictures import sample_images
from rsaft_fast.smoothing.precision import check_precision
from rsaft_fast.train.assemble import Assembly, assemble
from rsaft_fast.train.checkpoint import Checkpoint, parameter_of
from rsaft_fast.train.inputs import Inputs
from rsaft_fast.train.loaders import FileLoaders, Loaders
from rsaft_fast.train.model_card import describe_export
from rsaft_fast.train.optimizer import check_state, learning_rate, load_state
from rsaft_fast.train.steering import split_state

PACKAGES = ("torch", "diffusers", "transformers", "peft", "safetensors")


class PeerUnreachableError(PeerError):
    """A reward server is gone; rank 0 says which. All ranks are between two iterations."""


class Trainer(Assembly):
    """A run's objects, and what is done with them.

    Attributes:
        step: updates done.
        advise: what lowers the memory that a phase needs, for the message when there is too little; None if unknown.
    """

    def __init__(
        self,
        config: Config,
        inputs: Inputs,
        log: Callable[[str], None] = lambda line: None,
        stage: Callable[[str], None] = lambda line: None,
        loaders: Loaders | None = None,
        world: World | None = None,
    ):
        """
        Args:
            log: takes what the user should know.
            stage: takes a line about what begins now and may take long.
            loaders: where models come from; None loads what the recipe names.

        Raises:
            UserError: something cannot be loaded, does not go together, or does not fit into memory.
        """
        super().__init__(**vars(assemble(config, inputs, loaders or FileLoaders(config, log, stage), world, log)))
        self.step = 0
        self.advise: Callable[[str], str | None] = lambda phase: None

    def check_reward(self, images: torch.Tensor | None) -> None:
        """Refuse a reward in low precision whose S1 is mostly rounding, at the radii that the recipe works with.

        Args:
            images: the first sample grid, (N, 3, H, W); None draws a few pictures where there is need.

        Raises:
            UserError: its S1 differs from that in float32 by more than a tenth.
        """
        balls = [ball for ball in (self.config.sharpness, self.config.smoothing.smallest_ball) if ball is not None]
        prompts = self.sample_prompts if images is not None else self.scored_prompts
        with oom_as_user_error("checking the reward"):
            draw: Any = lambda some: self._draw(some) if images is None else images[: len(some)]  # noqa: E731
            check_precision(self.reward, balls, prompts, draw)
        free_memory(self.device)  # the float32 copy refers to itself

    @property
    def halted(self) -> str | None:
        """Why the judges or the monitors end the run here, in words; None where they do not."""
        ends = [part.halted for part in (self.steering, self.monitors) if part is not None]
        return next((said for said in ends if said is not None), None)

    def iterate(self) -> Iterator[dict[str, Any]]:
        """Make the updates of the next iteration; yield a record for metrics.jsonl after each.

        None is made where the judges, asked first, halt the run.

        Raises:
            NonFiniteRewardError, UserError: a NaN reward, no memory left; weights are those before the update, or the
                error and `optimizer.half_stepped` say that a released update broke off.
            UnreachableError, PeerUnreachableError: a reward server is gone, of rank 0 and the others: all ranks are
                between two iterations.
        """
        started = time.perf_counter()
        algorithm, iteration = self.algorithm, self.step // self.algorithm.updates
        asked: dict[str, float] = {}
        with self._naming_oom():
            if self.steering is not None:
                asked = self.steering.look(self.step)
                if self.halted is not None:
                    return
            experience = self._collect(iteration)
            algorithm.judge(experience, self.world)
        for index in range(algorithm.updates):
            yield self._update(experience, index, started, asked)
            started = time.perf_counter()

    def _collect(self, iteration: int) -> Any:
        """Sample and score; where a rank's reward server is gone, all ranks end alike, and rank 0 says it."""
        gone, experience = None, None
        try:
            experience = self.algorithm.collect(self.batches(self.backbone, self.encoded, iteration))
        except UnreachableError as error:
            gone = error
        told = self.world.gathered(None if gone is None else str(gone))
        first = next((rank for rank, said in enumerate(told) if said is not None), None)
        if first is None:
            return experience
        if not self.world.is_first:
            raise PeerUnreachableError(f"the reward server of rank {first} is gone") from gone
        raise UnreachableError(f"{told[first]} (so says rank {first})" if first else str(told[0])) from gone

    def update(self) -> dict[str, Any]:
        """Make one iteration of an algorithm that updates once in it; return its record. See `iterate`."""
        (record,) = self.iterate()
        return record

    def _update(self, experience: Any, index: int, started: float, asked: Mapping[str, float]) -> dict[str, Any]:
        config, step = self.config, self.step
        lr = learning_rate(config.optimizer, step, config.max_steps)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        with self._naming_oom():
            figures, stats = update(
                self.algorithm,
                self.optimizer,
                list(self.algorithm.parts(experience, index)),
                perturbs=config.smoothing.parameters is not None,
                world=self.world,
                compare_gradients=config.logging.diagnostics and not config.optimizer.release_gradients,
                ascent=self.ascent,
                number=step,
                adjust=self.steering.adjust if self.steering is not None else None,
            )
        self.algorithm.after_update(figures)
        if self.steering is not None:
            figures = {**self.steering.note(figures), **asked}
        denoising_loss = None
        with self._naming_oom("the optimizer's step is made; go on from the last checkpoint"):
            if self.denoising is not None:
                denoising_loss = self.denoising.update(self.encoded, self.optimizer, step)
            self.step += 1
            if self.ema is not None:
                self.ema.update(self.step)
        record = {"step": self.step, **figures, **self._optimizer_figures(stats), "lr": lr}
        if self.denoising is not None:
            record["denoising_loss"] = denoising_loss
        return record | {"seconds": round(time.perf_counter() - started, 4)}

    def _naming_oom(self, state: str = "the weights are those before it") -> AbstractContextManager[None]:
        """`state`: what became of the weights, where no released update broke off."""
        told = lambda: "it broke off half done" if self.optimizer.half_stepped else state  # noqa: E731
        return oom_as_user_error(f"update {self.step + 1}", told, self.advise)

    def _optimizer_figures(self, stats: Mapping[str, float]) -> dict[str, float | None]:
        """The optimizer's own under the names of metrics.jsonl; `grad_norm` is that of the update's gradient, before
        clipping."""
        stats = dict(stats)
        perturbs = self.config.smoothing.parameters is not None
        figures = {
            "eps_norm": stats.pop("eps_norm") if perturbs else 0.0,
            # Of a direction that is zero (momentum's before the first update) nothing can survive.
            "projection": stats["projection"] if perturbs and stats["grad_norm"] > 0 else None,
            # Released gradients are gone before anybody could take their norm.
            "grad_norm": None if math.isnan(stats["second_grad_norm"]) else stats["second_grad_norm"],
            "skipped": stats.pop("skipped"),
        }
        # A second adapter is no perturbation of the optimizer's, which has nothing more to tell of it.
        if not (perturbs and self.config.logging.diagnostics) or isinstance(self.ascent, AuxiliaryAdapter):
            return figures
        del stats["second_grad_norm"], stats["projection"]
        return figures | {"first_grad_norm": stats.pop("grad_norm"), **stats}

    def sample(self, stop: Callable[[], bool] = lambda: False) -> torch.Tensor | None:
        """Sample the fixed prompts at the fixed noise, by the mean weights where there are any.

        Pictures (N, 3, H, W) on the host; each rank draws its share, and has all.
        """
        prompts = self.sample_prompts
        with oom_as_user_error("the sample grid"), phase(GRID), self.final_weights():
            own = self.world.share(len(prompts))
            drawn = self._draw(prompts, stop, own) if own else torch.empty(0)
            parts = self.world.gathered(drawn)
            there = [part for part in parts if part is not None]
            return torch.cat([part for part in there if len(part)]) if len(there) == len(parts) else None

    def draw(
        self, grid: bool, evaluation: bool, stop: Callable[[], bool] = lambda: False
    ) -> tuple[torch.Tensor | None, Drawn | None]:
        """Draw the sample grid's pictures and those of an evaluation, each where it is asked for.

        None stands for what is not, or did not come about because `stop` said so. Pictures that both have are drawn
        once.
        """
        drawn, monitors, count = None, self.monitors, len(self.sample_prompts)
        if evaluation and monitors is not None:
            with oom_as_user_error("the evaluation"), self.final_weights():
                drawn = monitors.draw(stop)
            if drawn is None:
                return None, None
            if grid and monitors.prompts[:count] == self.sample_prompts:
                return drawn.images[:count], drawn
        return self.sample(stop) if grid else None, drawn

    def evaluate(self, drawn: Drawn, beside: Mapping[str, float | None] = {}) -> dict[str, Any]:  # noqa: B006
        """Measure the pictures of an evaluation; see `Monitors.measure`.

        Raises:
            UserError: no memory left.
            NonFiniteRewardError: the trained reward's S1 has no finite score to start from.
        """
        assert self.monitors is not None
        with oom_as_user_error("the evaluation"), self.final_weights():
            return self.monitors.measure(drawn, self.step, beside)

    def _draw(
        self, prompts: list[str], stop: Callable[[], bool] = lambda: False, only: range | None = None
    ) -> torch.Tensor | None:
        seed = self.config.seed if self.config.samples.seed is None else self.config.samples.seed
        batch_size = min(self.config.data.batch_size, self.batches.largest_share)
        watch = lambda firsts: watched(firsts, "batches of the grid", len(firsts), "batch")  # noqa: E731
        return sample_images(
            self.backbone, self.schedule, self.encoded(prompts), seed, batch_size, stop, watch=watch, only=only
        )

    @torch.no_grad()
    def grid_reward(self, images: torch.Tensor) -> float:
        """The reward's mean over a sample grid's pictures, (N, 3, H, W).

        Raises:
            UserError: no memory left.
        """
        size = self.config.data.batch_size
        with oom_as_user_error("scoring the sample grid"):
            parts = [slice(first, first + size) for first in range(0, len(images), size)]
            scores = [self.reward.score(images[part].to(self.device), self.sample_prompts[part]) for part in parts]
        return float(torch.cat(scores).double().mean())

    def checkpoint(self) -> Checkpoint:
        """What `load` needs to go on bit for bit. Of a run in shards every rank has its own parts in it."""
        kept = self.ascent.kept if self.ascent is not None else {}
        return Checkpoint(
            step=self.step,
            weights={name: p.detach() for name, p in self.parameters.items()},
            optimizer=self.optimizer.state_dict(),
            copies=({MEAN: self.ema.whole()} if self.ema is not None else {})
            | {name: as_parts(self.parameters, tensors) for name, tensors in kept.items()}
            | self.algorithm.copies.whole(),
            algorithm=self.algorithm.state() | (self.steering.state() if self.steering is not None else {}),
            info=describe_software()
            | {"seed": self.config.seed, "reward": self.reward.spec.sha256, "optimizer": self._ordered_names()},
        )

    def check_fit(self, saved: Checkpoint, differing: Callable[[Sequence[str]], list[str]] = lambda keys: []) -> None:
        """Raise `UserError` if a checkpoint is another model's, or its optimizer state another optimizer's.

        Args:
            differing: which of these keys the checkpoint's run had otherwise, and how, for the message.
        """
        if saved.step % self.algorithm.updates:
            raise UserError(
                f"resume: the checkpoint is of update {saved.step}, and an iteration of method "
                f"{self.config.method.name} makes {self.algorithm.updates} updates; resume with the run's own method"
            )
        self._check_tensors("weights", saved.weights)
        if (MEAN in saved.copies) != (self.ema is not None):
            raise UserError("resume: the checkpoint and the recipe disagree on ema; set it as the run had it")
        kept = set(self.ascent.kept) if self.ascent is not None else set()
        if {name for name in saved.copies if name in KEPT} ^ kept:
            keys = ["smoothing.parameters.direction", "smoothing.parameters.reuse"]
            told = "; ".join(differing(keys)) or f"{' or '.join(keys)} is not what the run had"
            raise UserError(
                f"resume: {told}: the weight perturbation's direction keeps tensors between updates, and those in the "
                "checkpoint are not this recipe's; set it as the run had it"
            )
        if odd := (saved.copies.keys() ^ self.algorithm.copies.tensors.keys()) - {MEAN, *KEPT}:
            raise UserError(
                f"resume: the checkpoint and the algorithm of method {self.config.method.name} disagree on the copy "
                f"{min(odd)!r} of the weights; resume with the run's own method and its keys"
            )
        for name, tensors in saved.copies.items():
            self._check_tensors(f"copy {name!r}", tensors)
        own, _ = split_state(saved.algorithm)
        if odd := own.keys() ^ self.algorithm.state().keys():
            raise UserError(
                f"resume: the checkpoint's algorithm and that of method {self.config.method.name} disagree on "
                f"{min(odd)!r}; resume with the run's own method"
            )
        check_state(self.optimizer, self._ordered_names(), saved.optimizer, saved.info.get("optimizer"))

    def _check_tensors(self, what: str, tensors: Mapping[str, torch.Tensor]) -> None:
        wanted = {name: tuple(p.shape) for name, p in self.parameters.items()}
        found = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
        if wanted != found:
            odd = next(name for name in wanted | found if wanted.get(name) != found.get(name))
            raise UserError(
                f"resume: the checkpoint's {what} do not fit this recipe: {odd} is {found.get(odd, 'missing')} there "
                f"and {wanted.get(odd, 'missing')} here; resume with the run's own backbone and parameters"
            )

    def _ordered_names(self) -> list[str]:
        """Names of the parameters in the optimizer's order, which its state dict counts by."""
        names = {id(parameter): name for name, parameter in self.parameters.items()}
        return [names[id(p)] for group in self.optimizer.param_groups for p in group["params"]]

    @torch.no_grad()
    def load(self, saved: Checkpoint) -> None:
        """Go on from a checkpoint, bit for bit on as many ranks as wrote it. Of a run in shards every rank does."""
        self.check_fit(saved)
        saved = saved.filled(self._parted if self.is_sharded else None)
        load_parts(self.parameters, local_parts(self.parameters), saved.weights)
        load_state(self.optimizer, saved.optimizer)
        if self.ema is not None:
            self.ema.load(saved.copies[MEAN])
        self.algorithm.copies.load(saved.copies)
        for name, tensors in self.ascent.kept.items() if self.ascent is not None else ():
            load_parts(self.parameters, tensors, saved.copies[name])
        own, steered = split_state(saved.algorithm)
        self.algorithm.load(own)
        if self.steering is not None:
            self.steering.load(steered)
        self.step = saved.step

    def _parted(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        """Make what a tensor of a checkpoint in shards is read into: parted as its parameter is."""
        parameter = self.parameters[parameter_of(name, self._ordered_names())]
        return like(parameter, torch.empty_like(local(parameter), dtype=tensor.dtype))

    def export(self, folder: Path) -> Path:
        """Write what other programs load: `<folder>/lora`, or the denoiser as `<folder>/unet` or `/transformer`.

        Of a run in shards every rank calls this, and rank 0 writes.
        """
        lora = self.config.parameters.train == "lora"
        final = folder / ("lora" if lora else self.backbone.denoiser_name)
        temporary = folder / f".{final.name}.tmp"
        with self.final_weights():
            whole = self._gathered()
            if whole is not None and not self.world.is_first:
                return final
            remove_tree(temporary)
            try:
                with io_errors_of(temporary):
                    self._save(temporary, whole)
                    describe_export(temporary, final.name, self.config, self.backbone, self.step, self.reward.spec)
                replace_folder(temporary, final)
            except BaseException:
                remove_tree(temporary)
                raise
        return final

    def _gathered(self) -> dict[str, torch.Tensor] | None:
        """The denoiser's weights whole, on rank 0's host, a device holding one at a time; None where none are parted.

        Every rank calls this; the others get nothing.
        """
        if not self.is_sharded:
            return None
        self.world.gathered(None)  # until no rank calls the network
        return dict(whole_on_host(self.backbone.denoiser.state_dict(), keep=self.world.is_first))

    def export_lora(self, folder: Path) -> None:
        """Write `<folder>/lora`; a checkpoint is not complete, and not readable by others, without it."""
        if self.config.parameters.train == "lora":
            with self.final_weights():
                self._save(folder / "lora")

    def _save(self, folder: Path, whole: dict[str, torch.Tensor] | None = None) -> None:
        with io_errors_of(folder):
            if self.config.parameters.train == "lora":
                save_lora(self.backbone, folder, self.config.parameters.lora)
            elif whole is not None:
                self.backbone.save_denoiser(folder, whole)
            else:
                self.backbone.save_denoiser(folder)


def describe_software() -> dict[str, str]:
    """Versions of what the bits depend on."""
    packages = {name: metadata.version(name) for name in PACKAGES}
    return {"rsaft_fast": __version__} | packages | {"python": platform.python_version()}
