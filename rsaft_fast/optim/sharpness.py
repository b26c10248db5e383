"""Base of SAM and SAMAdamW: perturb, restore, the state between the two passes, and its diagnostics."""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist

from rsaft_fast import ops
from rsaft_fast.abi.table import WeightsChangedError, pinned
from rsaft_fast.distributed.shards import summed
from rsaft_fast.ops.eager import eager_only
from rsaft_fast.optim.buckets import Bucket
from rsaft_fast.optim.tables import TabledOptimizer
from rsaft_fast.optim.workers import Replicas, warn_if_several_workers

IDLE, PERTURBED, RESTORED, BROKEN_OFF = "idle", "perturbed", "restored", "broken off"


class SharpnessAware(TabledOptimizer):
    """Two-pass optimizer (SAM, arXiv 2010.01412): subclasses add `_update` and say which weights have a master.

    Phases: *idle* -> `perturb()` -> *perturbed* -> `restore()` -> *restored* -> `step()` -> *idle*. Perturbed,
    `step()` restores as part of the update; idle, it takes `plain=True`. An exception in any of them leaves the
    weights unperturbed and the phase *broken off*, from where every call but `restore()` is allowed: another
    `step()` tries again from the second pass's gradients, all others begin anew.
    """

    # torch's GradScaler then leaves unscaling and skipping to step(), through .grad_scale and .found_inf.
    _step_supports_amp_scaling = True

    def __init__(self, params, defaults: dict, process_group: dist.ProcessGroup | None, replicas: Replicas):
        self.process_group, self.replicas = process_group, replicas
        self._reset()
        super().__init__(params, defaults)

    # -- the two passes ------------------------------------------------------------------------------------------------

    @eager_only
    def perturb(self, zero_grad: bool = False) -> None:
        """Move the weights to `w + rho * g / ||g||` (`w**2 * g` for ASAM), the norm taken over all groups.

        Loss scaling cancels in it: unscale nothing before. A non-finite gradient leaves the weights as they are and
        makes the coming `step()` skip; a zero gradient moves nothing.

        Args:
            zero_grad: clear the gradients afterwards, ready for the second pass.

        Raises:
            RuntimeError: already perturbed. ValueError, TypeError: gradients that do not fit; weights are intact.
        """
        self._refuse_to_perturb()
        buckets = self._bound("bind_to_perturb")
        try:
            self._upload_rho()
            ops.global_norm([b.table for b in buckets], self._rho, out=self._first, process_group=self._norm_group())
            self._agree_with_replicas()
            self._perturb_all(buckets)
        except BaseException:
            for bucket in buckets:
                bucket.drop_backup()
            raise
        self._phase = PERTURBED
        with self._abandoned_on_error():
            self._finish(buckets, zero_grad)
            self._begin_second_pass()

    @eager_only
    def restore(self) -> None:
        """Put the weights back, bit for bit, without a step.

        A `step()` that follows is made from the new gradients.

        Raises:
            RuntimeError: the weights are not perturbed.
        """
        self._refuse_unless_perturbed("restore()")
        try:
            self._put_back()
        except BaseException:
            for bucket in self._buckets:
                bucket.close(for_good=False)
            raise
        for bucket in self._buckets:
            bucket.close()
            bucket.drop_backup()
            bucket.remember_versions()
        self._phase = RESTORED

    def _put_back(self) -> None:
        """Restore all weights, wherever they lie now."""
        try:
            for bucket in self._buckets:
                bucket.table.bind(weight=bucket.weights)
        except WeightsChangedError:
            for bucket in self._buckets:
                bucket.restore_changed(self._first)
            return
        for bucket in self._buckets:
            bucket.restore(self._first)

    @contextmanager
    def perturbed(self, zero_grad: bool = False) -> Iterator[None]:
        """Perturb, and restore at the end of the `with` block unless it made the step.

        `with opt.perturbed(zero_grad=True):` second forward and backward, and `opt.step()` as its last line.

        Inside the block `step()` restores and updates in one pass. If the block ends without it, or with any
        exception, the weights are restored on the way out.
        """
        self.perturb(zero_grad)
        with self._abandoned_on_error():
            yield
        if self._phase == PERTURBED:
            self.restore()

    @eager_only
    def step(self, closure: Callable[[], torch.Tensor] | None = None, *, plain: bool = False):
        """Restore the weights if they are perturbed, then update them from the gradients of the second pass.

        Non-finite gradients in either pass skip the update as a whole and count in `skipped`.

        Args:
            closure: computes the loss, calls `backward` and returns the loss. It runs for each pass still missing
                (twice, or once when already perturbed), with gradients cleared before each.
            plain: a step of the base optimizer, from one pass and without a perturbation.

        Returns:
            What the first call of the closure returned, or None.

        Raises:
            RuntimeError: not perturbed, and neither a closure nor `plain`; or perturbed, and `plain`.
        """
        self._refuse_to_step()
        if plain and (self._phase not in (IDLE, BROKEN_OFF) or closure is not None):
            raise RuntimeError(f"step(plain=True) with a closure, or {self._phase}: it is for one pass by itself")
        if self._phase == IDLE and closure is None and not plain:
            raise RuntimeError(
                "step() without perturb(): the second pass's gradients belong at w + e. Call perturb() after the first "
                "backward, or step(plain=True) for a step without a perturbation"
            )
        if plain:
            self._phase = IDLE
        with self._abandoned_on_error():
            loss = None if closure is None else self._run(closure)
            buckets = self._ready()
            try:
                self._update(buckets)
            except BaseException:
                for bucket in buckets:
                    bucket.close(for_good=self._phase != PERTURBED)
                raise
            for bucket in buckets:
                bucket.close()
            self._phase = IDLE
            self._finish(buckets, zero_grad=False)
        return loss

    def first_step(self, zero_grad: bool = False) -> None:
        """Call `perturb`, under the name that the usual SAM code gives it."""
        self.perturb(zero_grad)

    def second_step(self, zero_grad: bool = False) -> None:
        """Call `step`, under the name that the usual SAM code gives it.

        Raises:
            RuntimeError: `first_step` did not run before.
        """
        if self._phase == IDLE:
            raise RuntimeError("second_step() without first_step(): the weights are not perturbed")
        self.step()
        if zero_grad:
            self.zero_grad()

    def _run(self, closure: Callable):
        losses = []
        if self._phase != PERTURBED:
            losses.append(self._evaluate(closure))
            self.perturb()
        losses.append(self._evaluate(closure))
        return losses[0]

    @contextmanager
    def _abandoned_on_error(self) -> Iterator[None]:
        try:
            yield
        except BaseException as error:
            self._abandon(error)
            raise

    def _abandon(self, error: BaseException) -> None:
        """Put the weights back and clean up after an error between perturb() and the end of step()."""
        if self._phase == PERTURBED:
            self.restore()
        if self._phase == RESTORED:
            self._phase = BROKEN_OFF
        for name in ("grad_scale", "found_inf"):  # GradScaler takes them away only after a step that succeeds
            self.__dict__.pop(name, None)

    def _evaluate(self, closure: Callable):
        self.zero_grad()
        with torch.enable_grad():
            return closure()

    # -- what they leave behind ----------------------------------------------------------------------------------------

    @property
    def is_perturbed(self) -> bool:
        """Whether the weights are at `w + e` now."""
        return self._phase == PERTURBED

    @property
    def skipped(self) -> torch.Tensor:
        """Steps skipped for non-finite gradients so far: an int64 scalar on the device (`int(opt.skipped)` waits)."""
        return self._scalars.skipped if self._scalars is not None else torch.tensor(self._skipped_before)

    def check_finite(self, *tensors: torch.Tensor) -> None:
        """Prepare the second backward, for optimizers that must know before it; others wait for its norm."""

    @property
    def half_stepped(self) -> bool:
        """Whether an exception left some parameters updated and others not, for optimizers that make updates alone."""
        return False

    def stats(self, over_ranks: bool = False) -> dict[str, float]:
        """Give diagnostics of the last perturbation and the last step.

        Waits for the device: for logging, not for each step.

        Args:
            over_ranks: of sharded parameters, sum what is applied over all shards; every rank then calls this. Without
                it `eps_norm`, `projection`, `cosine` and `applied_over_rho` are of this rank's shards.

        Returns:
            `grad_norm`, `second_grad_norm`: norms of the two passes' gradients, over the scale that GradScaler
            gave to the step (ASAM's first: of `w * g`). The second is NaN where gradients were released.
            `eps_norm`: norm of the perturbation at the precision that the forward sees. `projection`: its
            component along the wanted perturbation, over the wanted length: 1 is right, below 0.5 it does not act.
            `cosine`: between the two. `applied_over_rho`: its length over the wanted length (rho without ASAM).
            `skipped`: steps skipped so far.
        """
        if self._scalars is None:
            raise RuntimeError("no statistics yet: they exist after the first perturb() or step()")
        sums = self._perturbation_sums()
        if over_ranks:
            sums = summed(sums, self._norm_group())
        scale = self._gradient_scale
        values = torch.stack(
            [self._first.norm / scale, self._second.norm / scale, self._scalars.skipped.double(), *sums]
        )
        first, second, skipped, applied_sq, dot, wanted_sq = values.tolist()
        applied, wanted = math.sqrt(applied_sq), math.sqrt(wanted_sq)
        return {
            "grad_norm": first,
            "second_grad_norm": second,
            "eps_norm": applied,
            "projection": dot / wanted_sq if wanted_sq else 0.0,
            "cosine": dot / (applied * wanted) if applied * wanted else 0.0,
            "applied_over_rho": applied / wanted if wanted else 0.0,
            "skipped": int(skipped),
        }

    def state_dict(self) -> dict:
        """Give the state dict of `torch.optim`, plus the count of skipped steps.

        Raises:
            RuntimeError: the weights are perturbed; whoever saves now would save them that way.
        """
        self._refuse_while_perturbed("state_dict()")
        return {**super().state_dict(), "skipped": self.skipped.detach().clone()}

    def add_param_group(self, param_group: dict) -> None:
        """Add a group as `torch.optim` does; refused while the weights are perturbed.

        Raises:
            RuntimeError: perturbed. ValueError: rho is not positive and finite.
        """
        self._refuse_while_perturbed("add_param_group()")
        self.check_group({**self.defaults, **param_group})
        super().add_param_group(param_group)
        self._drop_tables()

    def check_group(self, group: dict) -> None:
        """Raise ValueError for a hyper-parameter out of its range."""
        check_rho(group["rho"])

    # -- scalars -------------------------------------------------------------------------------------------------------

    def _reset(self) -> None:
        super()._reset()
        self._phase = IDLE
        self._was_scaled = False

    def _agree_with_replicas(self) -> None:
        """Skip a first pass that is non-finite on one worker on all: else their weights would part."""
        if self.replicas is None and self._norm_group() is None:
            warn_if_several_workers(stacklevel=4)
        elif self.replicas:
            dist.all_reduce(self._first.found_inf, dist.ReduceOp.MAX, group=self.replicas)

    def _norm_group(self) -> dist.ProcessGroup | None:
        """Over whose ranks squared norms are summed: those that were named, or that hold parts of the parameters."""
        return self._shard_group if self.process_group is None else self.process_group

    def _perturb_all(self, buckets: list[Bucket]) -> None:
        done = []
        try:
            for bucket in buckets:
                bucket.perturb(self._first)
                done.append(bucket)
        except BaseException:
            for bucket in buckets[: len(done) + 1]:
                if bucket in done or bucket.storage.master:  # a master is what it was, however far perturbing got
                    bucket.restore(self._first)
            for bucket in buckets:
                bucket.close()
            raise
        finally:
            for bucket in done:
                if bucket.gradients_taken():
                    for param in bucket.params:
                        param.grad = None

    def _upload_rho(self) -> None:
        rho = [group["rho"] for group in self.param_groups]
        if rho != self._rho_known:
            for value in rho:
                check_rho(value)
            upload(self._rho, rho)
            self._rho_known = rho

    def _take_grad_scale(self) -> torch.Tensor | None:
        """Give GradScaler's scale if it left unscaling to this step; keep it for `stats`."""
        grad_scale = getattr(self, "grad_scale", None)
        if grad_scale is not None:
            self._gradient_scale.copy_(grad_scale)
        elif self._was_scaled:
            self._gradient_scale.fill_(1.0)
        self._was_scaled = grad_scale is not None
        return grad_scale

    def _finish(self, buckets: list[Bucket], zero_grad: bool) -> None:
        for bucket in buckets:
            bucket.remember_versions()
            bucket.release_gradients()
            if self._phase != PERTURBED:
                bucket.drop_backup()
        if zero_grad:
            self.zero_grad()

    def _update(self, buckets: list[Bucket]) -> None:
        """Restore where needed and update; every table has its weights and gradients bound."""
        raise NotImplementedError

    def _with_defaults(self, state_dict: dict) -> dict:
        """Give the checkpoint groups that have every key of this optimizer, whoever wrote it."""
        groups = [{**self.defaults, **group} for group in state_dict["param_groups"]]
        return {**state_dict, "param_groups": groups}

    def _restore_skipped(self, state_dict: dict) -> None:
        self._skipped_before = int(state_dict.get("skipped", 0))
        if self._scalars is not None:
            self._scalars.skipped.fill_(self._skipped_before)

    def _begin_second_pass(self) -> None:
        """Prepare the second pass; the weights are at w + e."""

    def _refuse_to_step(self) -> None:
        """Raise RuntimeError where no step may be made, perturbed or not."""

    def _refuse_to_perturb(self) -> None:
        self._refuse_to_step()
        if self._phase == PERTURBED:
            raise RuntimeError("the weights are already perturbed: call step() or restore() before perturb()")

    def _refuse_while_perturbed(self, what: str) -> None:
        if self._phase == PERTURBED:
            raise RuntimeError(f"{what} while the weights are perturbed: call step() or restore() first")

    def _refuse_unless_perturbed(self, what: str) -> None:
        if self._phase != PERTURBED:
            raise RuntimeError(f"{what} while the weights are not perturbed: it belongs after perturb(), once")

    def __getstate__(self) -> dict:
        self._refuse_while_perturbed("copying the optimizer")
        return {**super().__getstate__(), "_skipped_before": int(self.skipped)}

    def __setstate__(self, state: dict) -> None:
        if "_phase" not in self.__dict__:  # unpickled or copied; load_state_dict comes here too, with everything set
            self.process_group = self.replicas = None
            self._reset()
        super().__setstate__(state)


def check_rho(rho: float) -> None:
    """Raise ValueError unless the radius is positive and finite."""
    if not (rho > 0 and math.isfinite(rho)):
        raise ValueError(f"rho={rho}: the radius must be positive and finite; for no perturbation leave perturb() out")


def upload(target: torch.Tensor, values: list) -> None:
    """Copy host numbers to a device tensor, without waiting."""
    target.copy_(pinned(torch.tensor(values, dtype=target.dtype), target.device), non_blocking=True)
