"""Tables of an optimizer's parameters: built when they are needed, and again when they no longer fit."""

import functools
import operator
from abc import abstractmethod

import torch

from rsaft_fast import ops
from rsaft_fast.abi.table import WeightsChangedError
from rsaft_fast.distributed.shards import shard_group
from rsaft_fast.optim.buckets import Bucket, Storage, check_weights_apart, make_buckets


class TabledOptimizer(torch.optim.Optimizer):
    """Optimizer whose kernels know parameters by address; it rebuilds the tables that have gone stale.

    Weights may get another layout, dtype or device, groups other parameters, at any time. Between the passes of a step
    (`is_perturbed`) tables stay as they are; where weights change there, they are restored by value first.
    """

    # None until the tables are built, which every use comes after; `skipped` and `stats` ask.
    _scalars: ops.StepScalars
    _first: ops.GradientNorm
    _second: ops.GradientNorm
    _gradient_scale: torch.Tensor

    @property
    @abstractmethod
    def is_perturbed(self) -> bool:
        """Whether the weights are between the two passes of a step."""

    @abstractmethod
    def restore(self) -> None:
        """Put perturbed weights back."""

    def _reset(self) -> None:
        self._buckets: list[Bucket] = []
        self._outdated = True
        self._shard_group: torch.distributed.ProcessGroup | None = None
        self._frozen: list[torch.Tensor] = []
        self._known_groups: list[tuple[list[torch.Tensor], bool]] = []
        self._skipped_before = 0
        self._scalars = self._first = self._second = None  # pyrefly: ignore[bad-assignment]
        self._gradient_scale = None  # pyrefly: ignore[bad-assignment]
        self._rho_known: list[float] | None = None

    def _drop_tables(self) -> None:
        """Rebuild the tables at the next pass; state and counters stay."""
        self._outdated = True

    def _built(self) -> list[Bucket]:
        """Give the buckets; build them anew when parameters were added, replaced or unfrozen since.

        Between the two passes they stay: what was perturbed is what is restored.
        """
        if not self.is_perturbed:
            if self._outdated or any(p.requires_grad for p in self._frozen) or self._groups_changed():
                self._rebuild()
        return self._buckets

    def _bound(self, bind: str) -> list[Bucket]:
        """Give the buckets, bound by this method; build anew where weights got another layout, dtype or device."""
        buckets = self._built()
        try:
            self._bind_all(buckets, bind)
        except WeightsChangedError:
            if self.is_perturbed:
                self.restore()
            self._rebuild()
            buckets = self._buckets
            self._bind_all(buckets, bind)
        return buckets

    def _bind_all(self, buckets: list[Bucket], bind: str) -> None:
        known = [bucket.table.places("weight") for bucket in buckets]
        try:
            for bucket in buckets:
                getattr(bucket, bind)()
            if any(bucket.table.places("weight") is not places for bucket, places in zip(buckets, known)):
                check_weights_apart(buckets)
        except BaseException:
            if not self.is_perturbed:
                for bucket in buckets:
                    bucket.drop_backup()
            raise

    def _ready(self) -> list[Bucket]:
        """Give the buckets with weights and gradients bound."""
        return self._bound("bind")

    def _groups_changed(self) -> bool:
        """Tell whether the groups hold other parameters, or are adaptive otherwise, than the tables know."""
        for group in self.param_groups:
            for name in ("rho", "adaptive"):  # a base optimizer's own methods know nothing of them
                group.setdefault(name, self.defaults[name])
        return len(self.param_groups) != len(self._known_groups) or any(
            bool(group["adaptive"]) is not adaptive
            or len(group["params"]) != len(params)
            or any(map(operator.is_not, group["params"], params))
            for group, (params, adaptive) in zip(self.param_groups, self._known_groups)
        )

    def _rebuild(self) -> None:
        self._outdated = True
        self._build()
        self._outdated = False

    def _build(self) -> None:
        if any(bucket.table.captured for bucket in self._buckets):
            raise RuntimeError(
                "parameters joined or changed, and a captured CUDA graph owns the tables: build a new optimizer"
            )
        params = [param for group in self.param_groups for param in group["params"]]
        self._shard_group = shard_group(param for param in params if param.requires_grad)
        buckets = make_buckets(self.param_groups, self._storage_of, self._kind_of)
        if not buckets:
            raise RuntimeError("no parameter requires a gradient: nothing to optimize")
        for bucket in buckets:
            self._bind_state(bucket)
        device, groups = buckets[0].table.device, len(self.param_groups)
        self._carry_over(buckets[0], device, groups)
        self._frozen = [param for param in params if not param.requires_grad]
        self._known_groups = [(list(group["params"]), bool(group["adaptive"])) for group in self.param_groups]
        self._no_rho = torch.zeros(groups, dtype=torch.float64, device=device)
        self._rho = torch.zeros(groups, dtype=torch.float64, device=device)
        self._rho_known = None
        self._buckets = buckets

    def _carry_over(self, bucket: Bucket, device: torch.device, groups: int) -> None:
        """Copy what a first pass and the last step left into scalars for as many groups, on this device.

        `bucket`: receives the sums of the last perturbation.
        """
        scalars, norms = ops.StepScalars(device, groups), [ops.GradientNorm(device, groups) for _ in range(2)]
        if self._scalars is None:
            scalars.skipped.fill_(self._skipped_before)
            self._gradient_scale = torch.ones((), dtype=torch.float64, device=device)
        else:
            scalars.skipped.copy_(self._scalars.skipped)
            self._gradient_scale = self._gradient_scale.to(device)
            for new, old in zip(norms, (self._first, self._second)):
                new.values[:2].copy_(old.values[:2])
                new.found_inf.copy_(old.found_inf)
            bucket.table.perturbation_sums[:1].copy_(self._perturbation_sums().expand(bucket.table.chunks, 3)[:1])
        self._scalars, (self._first, self._second) = scalars, norms

    def _perturbation_sums(self) -> torch.Tensor:
        """Add up the perturbation sums of all tables: float64 `(3,)`."""
        return functools.reduce(operator.add, (bucket.table.perturbation_sums.sum(0) for bucket in self._buckets))

    def _storage_of(self, param: torch.Tensor) -> Storage:
        """Give a parameter's kind of storage."""
        return Storage()

    def _kind_of(self, storage: Storage) -> type[Bucket]:
        return Bucket

    def _bind_state(self, bucket: Bucket) -> None:
        """Attach optimizer state to a new bucket."""
