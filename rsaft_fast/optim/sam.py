"""SAM: the two-pass step around any torch optimizer."""

import inspect
from collections import defaultdict
from typing import Any

import torch

from rsaft_fast import ops
from rsaft_fast.distributed.shards import local
from rsaft_fast.optim.buckets import Bucket
from rsaft_fast.optim.sharpness import IDLE, PERTURBED, SharpnessAware
from rsaft_fast.optim.workers import Replicas


class SAM(SharpnessAware):
    """Sharpness-aware minimisation (arXiv 2010.01412; `adaptive=True`: ASAM, arXiv 2102.11600) of any optimizer.

    The base optimizer shares this one's `param_groups` and `state`, so LR schedulers, `zero_grad` and checkpoints
    work on the SAM object alone. Weights are copied before the perturbation and copied back after it: restore is exact
    to the bit, and `param.data` keeps its storage. One copy of the weights is the extra memory.

    Whether a step must be skipped is known on the device. A base optimizer built with `fused=True` reads it there;
    for any other, `step()` waits for it, as GradScaler does. `SAMAdamW` never waits.

    A schedule-free base optimizer trains at other weights than it evaluates: `train()` and `eval()` are its own,
    and a pass at the weights for evaluation is refused.

    bf16 or fp16 weights hold next to nothing of a small perturbation (see `SAMAdamW`): keep float32 weights here.

    Args:
        params: parameters or groups (a group may set its own `rho`, `adaptive`), or an optimizer instance.
        base_optimizer: its class, with `kwargs` for it; absent when `params` is an instance. It makes its step from
            gradients that are there: none that needs a closure (LBFGS), makes two passes, or takes sparse gradients.
        rho: radius of the perturbation, > 0.
        process_group: the squared gradient norm is summed over its ranks, for parameters sharded over them. None: those
            of DTensors (FSDP2) are known; otherwise each worker perturbs by its own gradient, as in the paper
            (m-sharpness).
        replicas: ranks that hold the same weights (DDP: `torch.distributed.group.WORLD`); a non-finite first pass on
            one makes all of them skip. None: no other worker. False: the same, and no warning where there are workers.

    Raises:
        ValueError: a radius that is not positive and finite. TypeError: no base optimizer, two, or one that cannot be.
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
        self.base: torch.optim.Optimizer = None  # pyrefly: ignore[bad-assignment]  # under construction
        base = _build_base(params, base_optimizer, kwargs)
        defaults = {**base.defaults, "rho": rho, "adaptive": adaptive}
        super().__init__(base.param_groups, defaults, process_group, replicas)
        self.base = base
        del self._own_groups, self._own_state

    @property
    def base_optimizer(self) -> torch.optim.Optimizer:
        """`base` under the name that the usual SAM code gives it."""
        return self.base

    # Read from the base optimizer every time: its own load_state_dict() and add_param_group() replace them.

    @property
    def param_groups(self) -> list[dict]:
        return self._own_groups if self.base is None else self.base.param_groups

    @param_groups.setter
    def param_groups(self, groups: list[dict]) -> None:
        if self.base is None:  # under construction
            self._own_groups = groups
        else:
            self.base.param_groups = groups

    @property
    def state(self) -> defaultdict[torch.Tensor, Any]:  # pyrefly: ignore[bad-override-mutable-attribute]
        return self._own_state if self.base is None else self.base.state

    @state.setter
    def state(self, state: defaultdict[torch.Tensor, Any]) -> None:
        if self.base is None:
            self._own_state = state
        else:
            self.base.state = state

    def add_param_group(self, param_group: dict) -> None:
        if self.base is None:  # the constructor registers the base optimizer's own groups
            return super().add_param_group(param_group)
        self._refuse_while_perturbed("add_param_group()")
        for name in ("rho", "adaptive"):
            param_group.setdefault(name, self.defaults[name])
        self.check_group(param_group)
        self.base.add_param_group(param_group)
        self._drop_tables()

    def state_dict(self) -> dict:
        """Give the base optimizer's state dict, plus the count of skipped steps.

        Raises:
            RuntimeError: the weights are perturbed; whoever saves now would save them that way.
        """
        if type(self.base).state_dict is torch.optim.Optimizer.state_dict:
            return super().state_dict()
        self._refuse_while_perturbed("state_dict()")
        return {**self.base.state_dict(), "skipped": self.skipped.detach().clone()}

    def load_state_dict(self, state_dict: dict) -> None:
        """Load the base optimizer's state dict, or a checkpoint of the base optimizer alone."""
        self._refuse_while_perturbed("load_state_dict()")
        self.base.load_state_dict(self._with_defaults(state_dict) if "param_groups" in state_dict else state_dict)
        self._restore_skipped(state_dict)

    # -- schedule-free base optimizers ---------------------------------------------------------------------------------

    def train(self) -> None:
        """Put the weights for training in place, if the base optimizer has others for evaluation; else do nothing.

        Raises:
            RuntimeError: the weights are perturbed; the base optimizer would take that for a step of its own.
        """
        self._switch("train")

    def eval(self) -> None:
        """Put the weights for evaluation in place, if the base optimizer has others for training; else do nothing.

        Raises:
            RuntimeError: the weights are perturbed.
        """
        self._switch("eval")

    def _switch(self, mode: str) -> None:
        self._refuse_while_perturbed(f"{mode}()")
        switch = getattr(self.base, mode, None)
        if switch is not None:
            switch()

    def _refuse_to_step(self) -> None:
        modes = [getattr(self.base, "train_mode", True), *(g.get("train_mode", True) for g in self.param_groups)]
        if not all(modes):
            raise RuntimeError(
                f"{type(self.base).__name__} has its weights for evaluation in place, and gradients belong at those "
                "for training: call optimizer.train() before the first pass"
            )

    def _update(self, buckets: list[Bucket]) -> None:
        tables = [bucket.table for bucket in buckets]
        ops.global_norm(tables, self._no_rho, plain=True, out=self._second, process_group=self._norm_group())
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
        grad_scale = self._take_grad_scale()
        if getattr(self.base, "_step_supports_amp_scaling", False):
            self.base.__dict__.update(grad_scale=grad_scale, found_inf=skip)
            try:
                self.base.step()
            finally:
                for name in ("grad_scale", "found_inf"):
                    self.base.__dict__.pop(name, None)
        elif not skip.item():
            if grad_scale is None:
                return self.base.step()
            grads = [local(p.grad) for group in self.param_groups for p in group["params"] if p.grad is not None]
            torch._foreach_div_(grads, grad_scale)
            try:
                self.base.step()
            except BaseException:  # another attempt begins from gradients that are scaled
                torch._foreach_mul_(grads, grad_scale)
                raise

    def __getstate__(self) -> dict:
        return {**super().__getstate__(), "base": self.base}

    def __setstate__(self, state: dict) -> None:
        own = {name: value for name, value in state.items() if name not in ("param_groups", "state")}
        self.base = state.get("base", self.__dict__.get("base"))
        super().__setstate__(own)


def _build_base(params, base_optimizer, kwargs: dict) -> torch.optim.Optimizer:
    if isinstance(params, torch.optim.Optimizer):
        if base_optimizer is not None or kwargs:
            raise TypeError("SAM got an optimizer instance: it takes no base_optimizer and no options for one")
        base = params
    elif base_optimizer is None:
        raise TypeError("SAM needs a base optimizer: SAM(params, torch.optim.AdamW, lr=1e-3) or SAM(optimizer)")
    elif isinstance(base_optimizer, torch.optim.Optimizer):
        raise TypeError("SAM got parameters and an optimizer instance, which has its own: SAM(optimizer)")
    else:
        base = base_optimizer(params, **kwargs)
    _check_base(base)
    return base


def _check_base(base: torch.optim.Optimizer) -> None:
    """Raise TypeError for a base that cannot make its step from the gradients that are there."""
    name = type(base).__name__
    if not isinstance(base, torch.optim.Optimizer):
        raise TypeError(f"the base optimizer is a {name}, not a torch.optim.Optimizer")
    if isinstance(base, SharpnessAware) or hasattr(base, "first_step"):
        raise TypeError(f"{name} makes two passes itself and cannot be SAM's base: use one of the two")
    if isinstance(base, torch.optim.SparseAdam):
        raise TypeError("SparseAdam takes sparse gradients only, and SAM dense ones: use AdamW, with sparse=False")
    parameters = inspect.signature(base.step).parameters.values()
    named = [p for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    needed = ", ".join(p.name for p in named if p.default is p.empty)
    if needed:
        raise TypeError(
            f"{name} cannot be SAM's base: its step needs {needed}, and SAM has only the second pass's gradients. "
            "Use one whose step() takes the gradients that there are (SGD, AdamW)"
        )
