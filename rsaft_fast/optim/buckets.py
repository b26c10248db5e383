"""Buckets: the parameters of all groups, sorted into one TensorTable a kind of storage."""

import operator
import warnings
from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple

import torch

from rsaft_fast import ops
from rsaft_fast.abi.table import LayoutError, check_overlap
from rsaft_fast.distributed.shards import local, local_gradient
from rsaft_fast.ops import TensorTable

LOW_PRECISION = (torch.bfloat16, torch.float16)


class Storage(NamedTuple):
    """Kind of storage of a parameter; parameters of one kind share a table.

    Attributes:
        master: its weight is the rounded copy of a float32 master. eight_bit: its moments are 8-bit codes.
        rounding_seed: of stochastic rounding; None rounds to nearest.
        backup: where its old bits wait while it is perturbed, if there is no master: in memory of their `own`, or in
            that of the first pass's `gradient`.
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
        params: trainable parameters of one dtype on one device, of DTensors this rank's part. groups: the group index
            of each.
        indices: the index of each in the optimizer. adaptive: ASAM. storage: how they are kept.
    """

    def __init__(
        self, params: list[torch.Tensor], groups: list[int], indices: list[int], adaptive: bool, storage: Storage
    ):
        self.params = params
        self.storage = storage
        self.table = TensorTable(
            self.weights, group=groups, adaptive=adaptive, parameter=indices, rounding_seed=storage.rounding_seed
        )
        self._backup: list[torch.Tensor | None] | None = None
        self._samples = _one_of_each_kind(params)
        self._passes = 0
        self.versions = [weight._version for weight in self.weights]
        self._states: list[dict[str, torch.Tensor]] = []
        self._state_lists: dict[str, list[torch.Tensor]] = {}

    @property
    def weights(self) -> list[torch.Tensor]:
        """The parameters as kernels see them."""
        return [local(param) for param in self.params]

    def bind(self) -> None:
        """Attach the weights and gradients as they are now; moved addresses are uploaded.

        Raises:
            WeightsChangedError: the weights are no longer what the table was built for.
        """
        if self.storage.static and "grad" in self.table:
            self._spot_check()
        else:
            self._bind_gradients()

    def _bind_gradients(self, as_backup: bool = False) -> list[torch.Tensor | None]:
        """Bind gradients beside the weights.

        Of a gradient in another layout a copy is bound, as kernels walk both in memory order.
        """
        gradients = [local_gradient(p) for p in self.params]
        try:
            self._bind(gradients, as_backup)
        except LayoutError:
            if self.storage.static:  # a copy would not stay where it is
                raise
            gradients = [in_layout_of(weight, grad) for weight, grad in zip(self.weights, gradients)]
            self._bind(gradients, as_backup)
        return gradients

    def _bind(self, gradients: list[torch.Tensor | None], as_backup: bool) -> None:
        backup = {"backup": gradients} if as_backup else {}
        self.table.bind(weight=self.weights, grad=gradients, **backup)

    def bind_to_perturb(self) -> None:
        """Attach weights, gradients and a place for the old bits, in one upload.

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
            self._backup = gradients = self._bind_gradients(as_backup=True)
            try:
                _check_can_hold(self.weights, gradients)
            except ValueError:
                self.drop_backup()
                raise

    def perturb(self, norm: ops.GradientNorm) -> None:
        """Move the weights to w + e."""
        ops.sam_perturb_(self.table, norm)

    def restore(self, norm: ops.GradientNorm, index: int | None = None) -> None:
        """Put the weights back from w + e; those of one parameter, or all."""
        ops.sam_restore_(self.table, norm, index)

    def restore_changed(self, norm: ops.GradientNorm, indices: Iterable[int] | None = None) -> None:
        """Restore weights that have changed layout, dtype or device since `perturb`.

        The table's addresses and strides are of the past, the values are not.

        Raises:
            ValueError: a weight has another shape now. No weight has been written then.
        """
        weights = self.weights
        indices = range(len(weights)) if indices is None else list(indices)
        for index in indices:
            if weights[index].shape != self.table.shapes[index]:
                raise ValueError(
                    f"weight {index} has shape {tuple(weights[index].shape)}, and had "
                    f"{tuple(self.table.shapes[index])} when it was perturbed: give it that shape to restore it"
                )
        for index in indices:
            weight, old = weights[index], self._old_weight(index)
            if old is not None:
                intact = (norm.found_inf == 0).to(weight.device)
                weight.copy_(torch.where(intact, old.to(weight.device, weight.dtype), weight))

    def _old_weight(self, index: int) -> torch.Tensor | None:
        """Give a perturbed weight's old value; None if it was never perturbed."""
        if self.storage.master:
            return self._states[index]["master"].to(self.table.dtypes["weight"])
        return None if self._backup is None else self._backup[index]

    # -- state of the parameters, for optimizers that keep some --------------------------------------------------------

    def know_state(self, states: list[dict[str, torch.Tensor]], names: Iterable[str]) -> None:
        """Remember which state tensors the table holds."""
        self._states = states
        self._state_lists = {name: [state[name] for state in states] for name in names}

    def known_state(self, name: str) -> list[torch.Tensor]:
        """Give the state tensors `name` that the table holds."""
        return self._state_lists[name]

    def state_replaced(self, state: Mapping[torch.Tensor, dict[str, torch.Tensor]]) -> bool:
        """Tell whether an optimizer's state holds other tensors than the table knows: cleared, say, or set anew."""
        indices = self._sampled() if self.storage.static else None
        params, states = _at(self.params, indices), _at(self._states, indices)
        if any(map(operator.is_not, map(state.get, params), states)):
            return True
        return any(
            state.get(name) is not known
            for name, tensors in self._state_lists.items()
            for state, known in zip(states, _at(tensors, indices))
        )

    def reserve(self) -> None:
        """Allocate the memory that a step needs, before anything is touched."""

    def step(self, scalars: ops.StepScalars, first: ops.GradientNorm | None, restore: bool) -> None:
        """Restore the weights where asked, and make AdamW's update."""
        ops.sam_adamw_step_(self.table, scalars, first=first, restore=restore)

    def step_tensor(self, index: int, grad: torch.Tensor, scalars: ops.StepScalars, first: ops.GradientNorm) -> None:
        """Restore and update one parameter, from a gradient that nobody else will see."""
        ops.sam_adamw_step_tensor_(self.table, index, grad, scalars, first=first)

    def close(self, for_good: bool = True) -> None:
        """End a pass, finished or broken off, and leave no copy under way.

        `for_good`: the weights are not perturbed.
        """

    def gradients_taken(self) -> bool:
        """Whether the gradients' memory now holds the old weights: then nobody may see it as `p.grad`."""
        return not self.storage.master and self.storage.backup == "gradient"

    def drop_backup(self, index: int | None = None) -> None:
        """Free the backup that lives in gradients; of one tensor, or all."""
        if self.gradients_taken() and self._backup is not None:
            if index is None:
                self._backup = None
                self.table.release("backup")
            else:
                self._backup[index] = None
                self.table.forget("backup", index)

    def _own_backup(self) -> list[torch.Tensor | None]:
        """Allocate backup storage of the weights' dtype, kept from step to step so that its addresses stay."""
        if self._backup is None:
            if self.table.dtypes["weight"] in LOW_PRECISION and self.storage.rounding_seed is None:
                warnings.warn(
                    f"{self.table.dtypes['weight']} weights without a float32 master hold next to nothing of a small "
                    "perturbation: use SAMAdamW with master_weights or stochastic_rounding, or float32 weights (see "
                    "stats()['projection'])",
                    stacklevel=7,
                )
            self._backup = [torch.empty_like(weight, requires_grad=False) for weight in self.weights]
        return self._backup

    def _sampled(self) -> list[int]:
        """Choose the indices that this pass looks at where it does not look at all: one of each kind, in turn.

        What moves many at once moves all of a kind (`module.to(memory_format=...)` those of four dimensions), and
        gradients that were made anew have all moved.
        """
        return [kind[self._passes % len(kind)] for kind in self._samples]

    def _spot_check(self) -> None:
        self._passes += 1
        for index in self._sampled():
            weight = local(self.params[index])
            if not self.table.suits(index, weight) or not self.table.holds("weight", index, weight):
                self.table.bind(weight=self.weights)
            if not self.table.holds("grad", index, local_gradient(self.params[index])):
                raise RuntimeError(
                    f"the gradient of parameter {index} moved, and static_gradients=True promised that none does: "
                    "clear gradients with zero_grad(set_to_none=False), or leave the promise out"
                )

    def release_gradients(self) -> None:
        """Drop the references to gradients between operations, or `zero_grad(set_to_none=True)` would free nothing."""
        if not self.storage.static:
            self.table.release("grad")

    def remember_versions(self) -> None:
        """Remember the tensors' versions after own writes; one that differs later means that somebody else wrote."""
        if self.storage.master:
            self.versions = [weight._version for weight in self.weights]


def make_buckets(
    param_groups: list[dict],
    storage_of: Callable[[torch.Tensor], Storage],
    kind_of: Callable[[Storage], type[Bucket]] = lambda storage: Bucket,
) -> list[Bucket]:
    """Sort the parameters that require gradients into one bucket a (dtype, adaptive, storage).

    Args:
        param_groups: as in `torch.optim`. storage_of: how a parameter is kept. kind_of: the class for it.

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
    buckets = [
        kind_of(storage)(params, groups, indices, adaptive, storage)
        for (_, adaptive, storage), (params, groups, indices) in members.items()
    ]
    check_weights_apart(buckets)
    return buckets


def check_weights_apart(buckets: list[Bucket]) -> None:
    """Raise ValueError if parameters of different buckets share memory; a table looks at its own."""
    if len(buckets) > 1:
        check_overlap(
            (f"weight {index}", weight)
            for bucket in buckets
            for index, weight in zip(bucket.table.parameters, bucket.weights)
        )


def in_layout_of(weight: torch.Tensor, grad: torch.Tensor | None) -> torch.Tensor | None:
    """Give the gradient itself if it lies as its weight does, else a copy that does.

    What cannot be its gradient stays as it is.
    """
    if grad is None or grad.layout is not torch.strided or grad.device != weight.device or grad.shape != weight.shape:
        return grad
    if grad.stride() == weight.stride() or not grad.data_ptr():
        return grad
    return torch.empty_like(weight, dtype=grad.dtype, requires_grad=False).copy_(grad)


def _one_of_each_kind(params: list[torch.Tensor]) -> list[list[int]]:
    """Group the indices by the number of dimensions longer than 1."""
    kinds: dict[int, list[int]] = {}
    for index, param in enumerate(params):
        kinds.setdefault(sum(size > 1 for size in param.shape), []).append(index)
    return list(kinds.values())


def _at(items: list, indices: list[int] | None) -> list:
    return items if indices is None else [items[index] for index in indices]


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
