"""Parameters of all groups, sorted into one TensorTable a (dtype, master, adaptive)."""

import warnings
from collections.abc import Iterable

import torch

from rsaft_fast.ops import TensorTable

LOW_PRECISION = (torch.bfloat16, torch.float16)


class Bucket:
    """Parameters that one launch can update, their table, and the storage that restoring needs.

    Args:
        params: trainable parameters of one dtype on one device. groups: the group index of each.
        adaptive: ASAM. has_master: whether the weights are rounded copies of a float32 master.
    """

    def __init__(self, params: list[torch.Tensor], groups: list[int], adaptive: bool, has_master: bool):
        self.params = params
        self.has_master = has_master
        self.table = TensorTable(params, group=groups, adaptive=adaptive)
        self._backup: list[torch.Tensor] | None = None
        self.versions = [p._version for p in params]

    def bind(self) -> None:
        """Attach the weights and gradients as they are now; moved addresses are uploaded."""
        self.table.bind(weight=self.params, grad=[p.grad for p in self.params])

    def bind_backup(self) -> None:
        """Backup storage of the weights' own dtype, kept from step to step so that its addresses stay."""
        if self._backup is None:
            if self.table.dtypes["weight"] in LOW_PRECISION:
                warnings.warn(
                    f"{self.table.dtypes['weight']} weights without a float32 master hold next to nothing of a small "
                    "perturbation: use SAMAdamW with master_weights, or float32 weights (see stats()['projection'])",
                    stacklevel=4,
                )
            self._backup = [torch.empty_like(p) for p in self.params]
        self.table.bind(backup=self._backup)

    def release_gradients(self) -> None:
        """Hold no reference to gradients between operations, or ``zero_grad(set_to_none=True)`` would free nothing."""
        self.table.release("grad")

    def remember_versions(self) -> None:
        """Call after own writes; a version that differs later means that somebody else wrote."""
        if self.has_master:
            self.versions = [p._version for p in self.params]


def make_buckets(param_groups: list[dict], master_of: dict[torch.dtype, bool]) -> list[Bucket]:
    """One bucket a (dtype, adaptive) over the parameters that require gradients.

    Args:
        param_groups: as in ``torch.optim``. master_of: whether weights of a dtype have a float32 master.

    Raises:
        ValueError: parameters on several devices, overlapping or expanded ones. TypeError: not floating point.
    """
    members: dict[tuple, tuple[list, list]] = {}
    for index, group in enumerate(param_groups):
        for param in _unique(group["params"]):
            if param.requires_grad:
                params, groups = members.setdefault((param.dtype, bool(group["adaptive"])), ([], []))
                params.append(param)
                groups.append(index)
    devices = {param.device for params, _ in members.values() for param in params}
    if len(devices) > 1:
        names = ", ".join(sorted(map(str, devices)))
        raise ValueError(f"parameters on {names}: one optimizer works on one device; build one optimizer a device")
    return [
        Bucket(params, groups, adaptive, master_of.get(dtype, False))
        for (dtype, adaptive), (params, groups) in members.items()
    ]


def _unique(params: Iterable[torch.Tensor]) -> list[torch.Tensor]:
    return list({id(param): param for param in params}.values())
