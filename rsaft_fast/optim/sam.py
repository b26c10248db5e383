"""SAM around any torch optimizer."""

import torch

from rsaft_fast import ops

from .buckets import Bucket
from .sharpness import IDLE, PERTURBED, SharpnessAware
from .workers import Replicas


class SAM(SharpnessAware):
    """Sharpness-aware minimisation (arXiv 2010.01412; ``adaptive=True``: ASAM, arXiv 2102.11600) of any optimizer.

    The base optimizer shares this one's ``param_groups`` and ``state``, so LR schedulers, ``zero_grad`` and checkpoints
    work on the SAM object alone. Weights are copied before the perturbation and copied back after it: restore is exact
    to the bit, and ``param.data`` keeps its storage. One copy of the weights is the extra memory.

    Whether a step must be skipped is known on the device. A base optimizer built with ``fused=True`` reads it there;
    for any other, ``step()`` waits for it, as GradScaler does. ``SAMAdamW`` never waits.

    bf16 or fp16 weights hold next to nothing of a small perturbation (see ``SAMAdamW``): keep float32 weights here.

    Args:
        params: parameters or groups (a group may set its own ``rho``, ``adaptive``), or an optimizer instance.
        base_optimizer: its class, with ``kwargs`` for it; absent when ``params`` is an instance.
        rho: radius of the perturbation, > 0.
        process_group: the squared gradient norm is summed over its ranks, for parameters sharded over them. None: each
            worker perturbs by its own gradient, as in the paper (m-sharpness).
        replicas: ranks that hold the same weights (DDP: ``torch.distributed.group.WORLD``); a non-finite first pass on
            one makes all of them skip. None: no other worker. False: the same, and no warning where there are workers.

    Raises:
        ValueError: a radius that is not positive and finite. TypeError: no base optimizer, or two.
    """

    def __init__(
        self,
        params,
        base_optimizer: type[torch.optim.Optimizer] | None = None,
        rho: float = 0.05,
        adaptive: bool = False,
        process_group: torch.distributed.ProcessGroup | None = None,
        replicas: Replicas = None,
        **kwargs,
    ):
        self.base: torch.optim.Optimizer | None = None
        base = _build_base(params, base_optimizer, kwargs)
        defaults = {**base.defaults, "rho": rho, "adaptive": adaptive}
        super().__init__(base.param_groups, defaults, process_group, replicas)
        self.base = base
        self._share()

    def _share(self) -> None:
        self.param_groups = self.base.param_groups
        self.state = self.base.state

    def add_param_group(self, param_group: dict) -> None:
        if self.base is None:  # the constructor registers the base optimizer's own groups
            return super().add_param_group(param_group)
        self._refuse_while_perturbed("add_param_group()")
        for name in ("rho", "adaptive"):
            param_group.setdefault(name, self.defaults[name])
        self.check_group(param_group)
        self.base.add_param_group(param_group)
        self._drop_tables()

    def load_state_dict(self, state_dict: dict) -> None:
        """As the base optimizer's; also takes a checkpoint of the base optimizer alone."""
        self._refuse_while_perturbed("load_state_dict()")
        self.base.load_state_dict(self._with_defaults(state_dict))
        self._share()
        self._restore_skipped(state_dict)

    def _update(self, buckets: list[Bucket]) -> None:
        tables = [bucket.table for bucket in buckets]
        ops.global_norm(tables, self._no_rho, plain=True, out=self._second, process_group=self.process_group)
        if self._phase == PERTURBED:
            for table in tables:
                ops.sam_restore_(table, self._first)
        self._step_base(self._skip_flag())

    def _skip_flag(self) -> torch.Tensor:
        flags = [self._second.found_inf, getattr(self, "found_inf", None)]
        if self._phase != IDLE:
            flags.append(self._first.found_inf)
        flag = torch.stack([f.to(self._second.found_inf) for f in flags if f is not None]).amax()
        self._scalars.skipped.add_((flag != 0).long())
        return flag

    def _step_base(self, skip: torch.Tensor) -> None:
        grad_scale = self._taken_grad_scale()
        if getattr(self.base, "_step_supports_amp_scaling", False):
            self.base.grad_scale, self.base.found_inf = grad_scale, skip
            try:
                self.base.step()
            finally:
                del self.base.grad_scale, self.base.found_inf
        elif not skip.item():
            if grad_scale is not None:
                grads = [p.grad for group in self.param_groups for p in group["params"] if p.grad is not None]
                torch._foreach_div_(grads, grad_scale)
            self.base.step()

    def __getstate__(self) -> dict:
        return {**super().__getstate__(), "base": self.base}

    def __setstate__(self, state: dict) -> None:
        super().__setstate__(state)
        self._share()


def _build_base(params, base_optimizer, kwargs: dict) -> torch.optim.Optimizer:
    if isinstance(params, torch.optim.Optimizer):
        if base_optimizer is not None or kwargs:
            raise TypeError("SAM got an optimizer instance: it takes no base_optimizer and no options for one")
        return params
    if base_optimizer is None:
        raise TypeError("SAM needs a base optimizer: SAM(params, torch.optim.AdamW, lr=1e-3) or SAM(optimizer)")
    return base_optimizer(params, **kwargs)
