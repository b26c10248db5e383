"""Parameters of all groups, sorted into one TensorTable a kind of storage."""

import warnings
from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch

from rsaft_fast import ops
from rsaft_fast.ops import TensorTable

LOW_PRECISION = (torch.bfloat16, torch.float16)


class Storage(NamedTuple):
    """How a parameter is kept; parameters that are kept alike share a table.

    Attributes:
        master: its weight is the rounded copy of a float32 master. eight_bit: its moments are 8-bit codes.
        rounding_seed: of stochastic rounding; None rounds to nearest.
        backup: where its old bits wait while it is perturbed, if there is no master: in memory of their ``own``, or in
            that of the first pass's ``gradient``.
        static: its gradient stays where it is. offload: its state is on the host.
    """

    master: bool = False
    eight_bit: bool = False
    rounding_seed: int | None = None
    backup: str = "own"
    static: bool = False
    offload: bool = False


class Bucket:
    """Parameters that one launch can update, their table, and the storage that restoring needs.

    Args:
        params: trainable parameters of one dtype on one device. groups: the group index of each.
        indices: the index of each in the optimizer. adaptive: ASAM. storage: how they are kept.
    """

    def __init__(
        self, params: list[torch.Tensor], groups: list[int], indices: list[int], adaptive: bool, storage: Storage
    ):
        self.params = params
        self.storage = storage
        self.table = TensorTable(
            params, group=groups, adaptive=adaptive, parameter=indices, rounding_seed=storage.rounding_seed
        )
        self._backup: list[torch.Tensor | None] | None = None
        self._checked = 0
        self.versions = [p._version for p in params]

    def bind(self) -> None:
        """Attach the weights and gradients as they are now; moved addresses are uploaded."""
        if self.storage.static and "grad" in self.table:
            self._spot_check()
        else:
            self.table.bind(weight=self.params, grad=[p.grad for p in self.params])

    def bind_to_perturb(self) -> None:
        """As ``bind``, with a place for the old bits, in one upload.

        Raises:
            ValueError: the gradients' memory cannot take them.
        """
        if self.storage.master:
            self.bind()
        elif self.storage.backup == "own":
            self.bind()
            if "backup" not in self.table:  # where it is, it stays
                self.table.bind(backup=self._own_backup())
        else:
            gradients = [p.grad for p in self.params]
            self.table.bind(weight=self.params, grad=gradients, backup=gradients)
            self._backup = gradients
            try:
                _check_can_hold(self.params, gradients)
            except ValueError:
                self.drop_backup()
                raise

    def perturb(self, norm: ops.GradientNorm) -> None:
        """To w + e."""
        ops.sam_perturb_(self.table, norm)

    def restore(self, norm: ops.GradientNorm, index: int | None = None) -> None:
        """Back from it; one parameter, or all."""
        ops.sam_restore_(self.table, norm, index)

    def reserve(self) -> None:
        """Take what memory a step needs, before anything is touched."""

    def step(self, scalars: ops.StepScalars, first: ops.GradientNorm | None, restore: bool) -> None:
        """Restore where asked, and AdamW's update."""
        ops.sam_adamw_step_(self.table, scalars, first=first, restore=restore)

    def step_tensor(self, index: int, grad: torch.Tensor, scalars: ops.StepScalars, first: ops.GradientNorm) -> None:
        """Restore and update one parameter, from a gradient that nobody else will see."""
        ops.sam_adamw_step_tensor_(self.table, index, grad, scalars, first=first)

    def close(self, for_good: bool = True) -> None:
        """A pass is over, or broke off: leave nothing on its way. ``for_good``: the weights are not perturbed."""

    def gradients_taken(self) -> bool:
        """Whether the gradients' memory now holds the old weights: then nobody may see it as ``p.grad``."""
        return not self.storage.master and self.storage.backup == "gradient"

    def drop_backup(self, index: int | None = None) -> None:
        """Free backup that lives in gradients; of one tensor, or all."""
        if self.gradients_taken() and self._backup is not None:
            if index is None:
                self._backup = None
                self.table.release("backup")
            else:
                self._backup[index] = None
                self.table.forget("backup", index)

    def _own_backup(self) -> list[torch.Tensor]:
        """Storage of the weights' own dtype, kept from step to step so that its addresses stay."""
        if self._backup is None:
            if self.table.dtypes["weight"] in LOW_PRECISION and self.storage.rounding_seed is None:
                warnings.warn(
                    f"{self.table.dtypes['weight']} weights without a float32 master hold next to nothing of a small "
                    "perturbation: use SAMAdamW with master_weights or stochastic_rounding, or float32 weights (see "
                    "stats()['projection'])",
                    stacklevel=5,
                )
            self._backup = [torch.empty_like(p, requires_grad=False) for p in self.params]
        return self._backup

    def _spot_check(self) -> None:
        """One parameter a pass, in turn: gradients that were made anew have all moved."""
        index = self._checked = (self._checked + 1) % len(self.params)
        param = self.params[index]
        if not self.table.holds("weight", index, param) or not self.table.holds("grad", index, param.grad):
            raise RuntimeError(
                f"parameter {index} or its gradient moved, and static_gradients=True promised that none does: clear "
                "gradients with zero_grad(set_to_none=False), or leave the promise out"
            )

    def release_gradients(self) -> None:
        """Hold no reference to gradients between operations, or ``zero_grad(set_to_none=True)`` would free nothing."""
        if not self.storage.static:
            self.table.release("grad")

    def remember_versions(self) -> None:
        """Call after own writes; a version that differs later means that somebody else wrote."""
        if self.storage.master:
            self.versions = [p._version for p in self.params]


def make_buckets(
    param_groups: list[dict],
    storage_of: Callable[[torch.Tensor], Storage],
    kind_of: Callable[[Storage], type[Bucket]] = lambda storage: Bucket,
) -> list[Bucket]:
    """One bucket a (dtype, adaptive, storage) over the parameters that require gradients.

    Args:
        param_groups: as in ``torch.optim``. storage_of: how a parameter is kept. kind_of: the class for it.

    Raises:
        ValueError: parameters on several devices, overlapping or expanded ones. TypeError: not floating point.
    """
    members: dict[tuple, tuple[list, list, list]] = {}
    position = 0
    for number, group in enumerate(param_groups):
        for param in _unique(group["params"]):
            if param.requires_grad:
                key = (param.dtype, bool(group["adaptive"]), storage_of(param))
                params, groups, indices = members.setdefault(key, ([], [], []))
                params.append(param)
                groups.append(number)
                indices.append(position)
            position += 1
    devices = {param.device for params, _, _ in members.values() for param in params}
    if len(devices) > 1:
        names = ", ".join(sorted(map(str, devices)))
        raise ValueError(f"parameters on {names}: one optimizer works on one device; build one optimizer a device")
    return [
        kind_of(storage)(params, groups, indices, adaptive, storage)
        for (_, adaptive, storage), (params, groups, indices) in members.items()
    ]


def _unique(params: Iterable[torch.Tensor]) -> list[torch.Tensor]:
    return list({id(param): param for param in params}.values())


def _check_can_hold(params: list[torch.Tensor], gradients: list[torch.Tensor | None]) -> None:
    for index, (param, grad) in enumerate(zip(params, gradients)):
        if grad is None:
            continue
        if grad.dtype != param.dtype:
            raise ValueError(
                f"gradient {index} is {grad.dtype}, its weight {param.dtype}: their memory cannot hold the weights' "
                'old bits; use backup="own"'
            )
        if grad.untyped_storage().nbytes() != grad.numel() * grad.element_size():
            raise ValueError(
                f"gradient {index} is a view of a larger buffer (DDP's gradient_as_bucket_view, say), whose owner "
                'would find old weights in it; use backup="own" and no release_gradients'
            )
