"""What SAM and SAMAdamW share: perturb, restore, the state between the two passes, and its diagnostics."""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist

from rsaft_fast import ops
from rsaft_fast.ops.table import pinned

from .buckets import Bucket, Storage, make_buckets
from .workers import Replicas, warn_of_silence

IDLE, PERTURBED, RESTORED = "idle", "perturbed", "restored"


class SharpnessAware(torch.optim.Optimizer):
    """Two-pass optimizer (SAM, arXiv 2010.01412): subclasses add ``_update`` and say which weights have a master.

    Phases: *idle* -> ``perturb()`` -> *perturbed* -> ``restore()`` -> *restored* -> ``step()`` -> *idle*. Perturbed,
    ``step()`` restores as part of the update; idle, it takes ``plain=True``.
    """

    # torch's GradScaler then leaves unscaling and skipping to step(), through .grad_scale and .found_inf.
    _step_supports_amp_scaling = True

    def __init__(self, params, defaults: dict, process_group: dist.ProcessGroup | None, replicas: Replicas):
        self.process_group, self.replicas = process_group, replicas
        self._reset()
        super().__init__(params, defaults)

    # -- the two passes ------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def perturb(self, zero_grad: bool = False) -> None:
        """Move the weights to ``w + rho * g / ||g||`` (``w**2 * g`` for ASAM), the norm taken over all groups.

        Loss scaling cancels in it: unscale nothing before. A non-finite gradient leaves the weights as they are and
        makes the coming ``step()`` skip; a zero gradient moves nothing.

        Args:
            zero_grad: clear the gradients afterwards, ready for the second pass.

        Raises:
            RuntimeError: already perturbed. ValueError, TypeError: gradients that do not fit; weights are intact.
        """
        self._refuse_to_perturb()
        buckets = self._built()
        self._upload_rho()
        for bucket in buckets:
            bucket.bind_to_perturb()
        ops.global_norm([b.table for b in buckets], self._rho, out=self._first, process_group=self.process_group)
        self._agree_with_replicas()
        self._perturb_all(buckets)
        self._phase = PERTURBED
        self._finish(buckets, zero_grad)
        self._begin_second_pass()

    @torch.no_grad()
    def restore(self) -> None:
        """Put the weights back, bit for bit, without a step. A ``step()`` that follows is made from the new gradients.

        Raises:
            RuntimeError: the weights are not perturbed.
        """
        self._refuse_unless_perturbed("restore()")
        for bucket in self._buckets:
            bucket.table.bind(weight=bucket.params)
            bucket.restore(self._first)
            bucket.close()
            bucket.drop_backup()
            bucket.remember_versions()
        self._phase = RESTORED

    @contextmanager
    def perturbed(self, zero_grad: bool = False) -> Iterator[None]:
        """``with opt.perturbed(zero_grad=True):`` second forward and backward, and ``opt.step()`` as its last line.

        Inside the block ``step()`` restores and updates in one pass. If the block ends without it, or with any
        exception, the weights are restored on the way out.
        """
        self.perturb(zero_grad)
        try:
            yield
        except BaseException as error:
            self._abandon(error)
            raise
        if self._phase == PERTURBED:
            self.restore()

    def step(self, closure: Callable[[], torch.Tensor] | None = None, *, plain: bool = False):
        """Restore the weights if they are perturbed, then update them from the gradients of the second pass.

        Non-finite gradients in either pass skip the update as a whole and count in ``skipped``.

        Args:
            closure: computes the loss, calls ``backward`` and returns the loss. It runs for each pass still missing
                (twice, or once when already perturbed), with gradients cleared before each.
            plain: a step of the base optimizer, from one pass and without a perturbation.

        Returns:
            What the first call of the closure returned, or None.

        Raises:
            RuntimeError: not perturbed, and neither a closure nor ``plain``; or perturbed, and ``plain``.
        """
        if plain and (self._phase != IDLE or closure is not None):
            raise RuntimeError(f"step(plain=True) with a closure, or {self._phase}: it is for one pass by itself")
        if self._phase == IDLE and closure is None and not plain:
            raise RuntimeError(
                "step() without perturb(): the second pass's gradients belong at w + e. Call perturb() after the first "
                "backward, or step(plain=True) for a step without a perturbation"
            )
        loss = None if closure is None else self._run(closure)
        with torch.no_grad():
            buckets = self._ready_or_restored()
            try:
                self._update(buckets)
            finally:
                for bucket in buckets:
                    bucket.close()
            self._phase = IDLE
            self._finish(buckets, zero_grad=False)
        return loss

    def first_step(self, zero_grad: bool = False) -> None:
        """``perturb`` under the name that the usual SAM code gives it."""
        self.perturb(zero_grad)

    def second_step(self, zero_grad: bool = False) -> None:
        """``step`` under the name that the usual SAM code gives it.

        Raises:
            RuntimeError: ``first_step`` did not run before.
        """
        if self._phase == IDLE:
            raise RuntimeError("second_step() without first_step(): the weights are not perturbed")
        self.step()
        if zero_grad:
            self.zero_grad()

    def _run(self, closure: Callable):
        losses = []
        try:
            if self._phase != PERTURBED:
                losses.append(self._evaluate(closure))
                self.perturb()
            losses.append(self._evaluate(closure))
        except BaseException as error:
            self._abandon(error)
            raise
        return losses[0]

    def _abandon(self, error: BaseException) -> None:
        """Something failed between the passes: the weights go back."""
        if self._phase == PERTURBED:
            self.restore()

    def _evaluate(self, closure: Callable):
        self.zero_grad()
        with torch.enable_grad():
            return closure()

    # -- what they leave behind ----------------------------------------------------------------------------------------

    @property
    def is_perturbed(self) -> bool:
        """Whether the weights are at ``w + e`` now."""
        return self._phase == PERTURBED

    @property
    def skipped(self) -> torch.Tensor:
        """Steps skipped for non-finite gradients so far: an int64 scalar on the device (``int(opt.skipped)`` waits)."""
        return self._scalars.skipped if self._scalars is not None else torch.tensor(self._skipped_before)

    def check_finite(self, *tensors: torch.Tensor) -> None:
        """What the second backward begins with, for optimizers that must know before it; others wait for its norm."""

    @property
    def half_stepped(self) -> bool:
        """Whether an exception left some parameters updated and others not: possible with released gradients only."""
        return False

    def stats(self) -> dict[str, float]:
        """Diagnostics of the last perturbation and the last step. Waits for the device: for logging, not for each step.

        Returns:
            ``grad_norm``, ``second_grad_norm``: norms of the two passes' gradients, over the scale that GradScaler
            gave to the step (ASAM's first: of ``w * g``). The second is NaN where gradients were released.
            ``eps_norm``: norm of the perturbation at the precision that the forward sees. ``projection``: its
            component along the wanted perturbation, over the wanted length: 1 is right, below 0.5 it does not act.
            ``cosine``: between the two. ``applied_over_rho``: its length over the wanted length (rho without ASAM).
            ``skipped``: steps skipped so far.
        """
        if self._scalars is None:
            raise RuntimeError("no statistics yet: they exist after the first perturb() or step()")
        sums = sum(bucket.table.perturbation_sums.sum(0) for bucket in self._buckets)
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
        """As ``torch.optim``, plus the count of skipped steps.

        Raises:
            RuntimeError: the weights are perturbed; whoever saves now would save them that way.
        """
        self._refuse_while_perturbed("state_dict()")
        return {**super().state_dict(), "skipped": self.skipped.detach().clone()}

    def add_param_group(self, param_group: dict) -> None:
        """As ``torch.optim``; refused while the weights are perturbed.

        Raises:
            RuntimeError: perturbed. ValueError: rho is not positive and finite.
        """
        self._refuse_while_perturbed("add_param_group()")
        self.check_group({**self.defaults, **param_group})
        super().add_param_group(param_group)
        self._drop_tables()

    def check_group(self, group: dict) -> None:
        """Raises ValueError for a hyper-parameter out of its range."""
        check_rho(group["rho"])

    # -- tables --------------------------------------------------------------------------------------------------------

    def _reset(self) -> None:
        self._phase = IDLE
        self._buckets: list[Bucket] = []
        self._outdated = True
        self._frozen: list[torch.Tensor] = []
        self._scalars: ops.StepScalars | None = None
        self._skipped_before = 0

    def _drop_tables(self) -> None:
        """Rebuild the tables at the next pass; state and counters stay."""
        self._outdated = True

    def _built(self) -> list[Bucket]:
        """The buckets; built anew when parameters were added or unfrozen since.

        Parameters unfrozen between the two passes join after the step: what was perturbed is what is restored.
        """
        if self._phase != PERTURBED and (self._outdated or any(p.requires_grad for p in self._frozen)):
            self._build()
        return self._buckets

    def _ready(self) -> list[Bucket]:
        """Buckets with weights and gradients bound."""
        buckets = self._built()
        for bucket in buckets:
            bucket.bind()
        return buckets

    def _agree_with_replicas(self) -> None:
        """A first pass that is non-finite on one worker is skipped on all: else their weights would part."""
        if self.replicas is None and self.process_group is None:
            warn_of_silence(stacklevel=4)
        elif self.replicas:
            dist.all_reduce(self._first.found_inf, dist.ReduceOp.MAX, group=self.replicas)

    def _perturb_all(self, buckets: list[Bucket]) -> None:
        done = []
        try:
            for bucket in buckets:
                bucket.perturb(self._first)
                done.append(bucket)
        except BaseException:
            for bucket in done:
                bucket.restore(self._first)
            for bucket in buckets:
                bucket.close()
            raise
        finally:
            for bucket in done:
                if bucket.gradients_taken():
                    for param in bucket.params:
                        param.grad = None

    def _ready_or_restored(self) -> list[Bucket]:
        try:
            return self._ready()
        except BaseException as error:
            self._abandon(error)
            raise

    def _build(self) -> None:
        if any(bucket.table.captured for bucket in self._buckets):
            raise RuntimeError("parameters joined, and a captured CUDA graph owns the tables: build a new optimizer")
        params = [param for group in self.param_groups for param in group["params"]]
        buckets = make_buckets(self.param_groups, self._storage_of, self._kind_of)
        if not buckets:
            raise RuntimeError("no parameter requires a gradient: nothing to optimize")
        self._frozen = [param for param in params if not param.requires_grad]
        self._buckets, self._outdated = buckets, False
        device, groups = buckets[0].table.device, len(self.param_groups)
        scalars = ops.StepScalars(device, groups)
        if self._scalars is None:
            scalars.skipped.fill_(self._skipped_before)
        else:
            scalars.skipped.copy_(self._scalars.skipped)
        self._scalars = scalars
        self._first, self._second = ops.GradientNorm(device, groups), ops.GradientNorm(device, groups)
        self._gradient_scale = torch.ones((), dtype=torch.float64, device=device)
        self._was_scaled = False
        self._no_rho = torch.zeros(groups, dtype=torch.float64, device=device)
        self._rho = torch.zeros(groups, dtype=torch.float64, device=device)
        self._rho_known: list[float] | None = None
        for bucket in buckets:
            self._bind_state(bucket)

    def _upload_rho(self) -> None:
        rho = [group["rho"] for group in self.param_groups]
        if rho != self._rho_known:
            for value in rho:
                check_rho(value)
            upload(self._rho, rho)
            self._rho_known = rho

    def _taken_grad_scale(self) -> torch.Tensor | None:
        """GradScaler's scale if it left unscaling to this step; kept for ``stats``."""
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

    def _storage_of(self, param: torch.Tensor) -> Storage:
        """How a parameter is kept."""
        return Storage()

    def _kind_of(self, storage: Storage) -> type[Bucket]:
        return Bucket

    def _bind_state(self, bucket: Bucket) -> None:
        """Attach optimizer state to a new bucket."""

    def _update(self, buckets: list[Bucket]) -> None:
        """Restore where needed and update; every table has its weights and gradients bound."""
        raise NotImplementedError

    def _with_defaults(self, state_dict: dict) -> dict:
        """The checkpoint with groups that have every key of this optimizer, whoever wrote it."""
        groups = [{**self.defaults, **group} for group in state_dict["param_groups"]]
        return {**state_dict, "param_groups": groups}

    def _restore_skipped(self, state_dict: dict) -> None:
        self._skipped_before = int(state_dict.get("skipped", 0))
        if self._scalars is not None:
            self._scalars.skipped.fill_(self._skipped_before)

    def _begin_second_pass(self) -> None:
        """Called when the weights are at w + e."""

    def _refuse_to_perturb(self) -> None:
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
    """Raises ValueError unless the radius is positive and finite."""
    if not (rho > 0 and math.isfinite(rho)):
        raise ValueError(f"rho={rho}: the radius must be positive and finite; for no perturbation leave perturb() out")


def upload(target: torch.Tensor, values: list) -> None:
    """Host numbers to a device tensor, without waiting."""
    target.copy_(pinned(torch.tensor(values, dtype=target.dtype), target.device), non_blocking=True)
