"""SAMAdamW: SAM and AdamW with restore, unscaling, clipping and update fused into one pass."""

import math

import torch

from rsaft_fast import ops

from .buckets import LOW_PRECISION, Bucket
from .sharpness import IDLE, PERTURBED, Replicas, SharpnessAware, upload


class SAMAdamW(SharpnessAware):
    """Sharpness-aware AdamW (arXiv 2010.01412 around arXiv 1711.05101) that never waits for the device.

    With ``perturb()`` before ``step()`` it equals ``SAM`` around ``torch.optim.AdamW``; without, ``torch.optim.AdamW``.
    Moments are float32 (float64 for float64 weights). Decoupled weight decay.

    **Master weights.** bf16 weights alone cannot hold a perturbation: at rho 1e-2 and 1e9 parameters, rounding to
    nearest loses about 99 % of it (each element's step is far below half a unit in the last place). With a float32
    master the weights become ``round(master + e)``: unbiased (projection 1 on the wanted direction) under rounding
    noise 10 to 20 times rho across it, still below the noise of casting the weights to bf16 at all. The master also
    makes restore exact without a backup, and keeps updates below bf16's resolution. Hence ``master_weights=None``
    means True for bf16 and fp16 weights; ``False`` is for those who accept a perturbation that hardly acts (watch
    ``stats()["projection"]``). Weights written by others (``load_state_dict``, an EMA swap) are noticed by version
    counter and copied to the master where they differ from it; writes through ``param.data`` are not.

    Args:
        params: parameters, named parameters or groups; groups may set ``lr``, ``betas``, ``eps``, ``weight_decay``,
            ``rho``, ``adaptive``.
        lr: a float, or a scalar tensor (on the device, for CUDA graphs).
        rho: radius of the perturbation, > 0. adaptive: ASAM (arXiv 2102.11600).
        max_grad_norm: clip the second pass's gradient to this global norm, as ``torch.nn.utils.clip_grad_norm_``.
        process_group: the squared gradient norm is summed over its ranks, for parameters sharded over them. None: each
            worker perturbs by its own gradient, as in the paper (m-sharpness).
        replicas: ranks that hold the same weights (DDP: ``torch.distributed.group.WORLD``); a non-finite first pass on
            one makes all of them skip. None: no other worker. False: the same, and no warning where there are workers.

    Raises:
        ValueError: a hyper-parameter out of its range.
    """

    def __init__(
        self,
        params,
        lr: float | torch.Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        rho: float = 0.05,
        adaptive: bool = False,
        max_grad_norm: float | None = None,
        master_weights: bool | None = None,
        process_group: torch.distributed.ProcessGroup | None = None,
        replicas: Replicas = None,
    ):
        if max_grad_norm is not None and not max_grad_norm > 0:
            raise ValueError(f"max_grad_norm={max_grad_norm}: it must be positive; None turns clipping off")
        self.max_grad_norm = max_grad_norm
        self.master_weights = master_weights is not False
        defaults = dict(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, rho=rho, adaptive=adaptive)
        super().__init__(params, defaults, process_group, replicas)

    def check_group(self, group: dict) -> None:
        super().check_group(group)
        limits = {
            "lr": isinstance(group["lr"], torch.Tensor) or 0 <= group["lr"] < math.inf,
            "betas": len(group["betas"]) == 2 and all(0 <= beta < 1 for beta in group["betas"]),
            "eps": 0 <= group["eps"] < math.inf,
            "weight_decay": 0 <= group["weight_decay"] < math.inf,
        }
        for name, ok in limits.items():
            if not ok:
                allowed = "two numbers in [0, 1)" if name == "betas" else "finite and not negative"
                raise ValueError(f"{name}={group[name]}: it must be {allowed}")

    def _update(self, buckets: list[Bucket]) -> None:
        self._upload_hyper()
        first = None if self._phase == IDLE else self._first
        inputs = ops.StepInputs(self._scalars, first, self._taken_grad_scale(), getattr(self, "found_inf", None))
        tables = [bucket.table for bucket in buckets]
        ops.global_norm(
            tables, self._no_rho, plain=True, out=self._second, process_group=self.process_group, inputs=inputs
        )
        ops.sam_adamw_step_(tables, self._scalars, first=first, restore=self._phase == PERTURBED)
        self._finish(buckets, zero_grad=False)

    def _upload_hyper(self) -> None:
        clip = math.inf if self.max_grad_norm is None else self.max_grad_norm
        rows, on_device = [], []
        for index, group in enumerate(self.param_groups):
            lr = group["lr"]
            if isinstance(lr, torch.Tensor) and lr.is_cuda:
                on_device.append((index, lr))
                lr = 0.0
            rows.append([float(lr), *group["betas"], group["eps"], group["weight_decay"], clip])
        if rows != self._hyper_known:
            upload(self._scalars.hyper, rows)
            self._hyper_known = rows
        for index, lr in on_device:
            self._scalars.hyper[index, 0].copy_(lr, non_blocking=True)

    # -- state ---------------------------------------------------------------------------------------------------------

    def _masters(self) -> dict[torch.dtype, bool]:
        return {dtype: self.master_weights for dtype in LOW_PRECISION}

    def _build(self) -> None:
        super()._build()
        self._hyper_known: list | None = None

    def _ready(self) -> list[Bucket]:
        if self._phase != PERTURBED:
            for bucket in self._buckets:
                self._refresh_masters(bucket)
        return super()._ready()

    def _refresh_masters(self, bucket: Bucket) -> None:
        if not bucket.has_master:
            return
        for param, version in zip(bucket.params, bucket.versions):
            if param._version != version:
                _agree(self.state[param]["master"], param)
        bucket.remember_versions()

    def _bind_restore_source(self, bucket: Bucket) -> None:
        if not bucket.has_master:
            super()._bind_restore_source(bucket)

    def _bind_state(self, bucket: Bucket) -> None:
        table, states = bucket.table, [self.state[param] for param in bucket.params]
        for param, state in zip(bucket.params, states):
            self._fill_state(param, state)
            if bucket.has_master:  # loaded, perhaps, before the weights were
                _agree(state["master"], param)
        if any("step" in state for state in states):
            zero = torch.zeros((), device=table.device)
            table.steps.copy_(torch.stack([state.get("step", zero) for state in states]))
        for state, step in zip(states, table.steps.unbind()):
            state["step"] = step
        table.bind(**{name: [state[name] for state in states] for name in self._state_names(bucket.params[0])})

    def _state_names(self, param: torch.Tensor) -> tuple[str, ...]:
        has_master = self._masters().get(param.dtype, False)
        return ("exp_avg", "exp_avg_sq", "master") if has_master else ("exp_avg", "exp_avg_sq")

    def _fill_state(self, param: torch.Tensor, state: dict) -> None:
        """Adds what is missing: zero moments, and the master as a copy of the weight."""
        dtype = torch.promote_types(param.dtype, torch.float32)
        for name in self._state_names(param):
            if name not in state:
                state[name] = torch.zeros_like(param, dtype=dtype)
                if name == "master":
                    state[name].copy_(param)

    def state_dict(self) -> dict:
        """As ``torch.optim.AdamW``, with ``master`` beside the moments and the count of skipped steps.

        Raises:
            RuntimeError: the weights are perturbed.
        """
        saved = super().state_dict()
        # Step counts are views of one tensor here; formats that refuse shared memory (safetensors) want them apart.
        saved["state"] = {key: {**state, "step": state["step"].clone()} for key, state in saved["state"].items()}
        return saved

    def load_state_dict(self, state_dict: dict) -> None:
        """As ``torch.optim``; existing state is overwritten in place, so that a captured graph stays valid.

        Takes a checkpoint of ``torch.optim.AdamW`` as well: groups keep this optimizer's ``rho`` and ``adaptive``, and
        the master starts from the weights.
        """
        self._refuse_while_perturbed("load_state_dict()")
        own = self.state
        # torch's own loader would cast moments and master to the weight's dtype: it gets the groups only.
        super().load_state_dict({**self._with_defaults(state_dict), "state": {}})
        self.state = own
        saved = [index for group in state_dict["param_groups"] for index in group["params"]]
        params = [param for group in self.param_groups for param in group["params"]]
        for index, param in zip(saved, params):
            self._load_param(param, state_dict["state"].get(index, {}))
        for bucket in self._buckets:
            bucket.remember_versions()
        self._restore_skipped(state_dict)

    def _load_param(self, param: torch.Tensor, saved: dict) -> None:
        state = self.state[param] if saved else self.state.get(param, {})
        for name in ("step", *self._state_names(param)) if saved or state else ():
            dtype = torch.float32 if name == "step" else torch.promote_types(param.dtype, torch.float32)
            value = saved.get(name, param.detach() if name == "master" else torch.zeros(()))
            if name not in state:
                shape = () if name == "step" else param.shape
                state[name] = torch.empty(shape, dtype=dtype, device=param.device)
                if name != "step":
                    state[name] = torch.empty_like(param, dtype=dtype)
            state[name].copy_(torch.as_tensor(value))

    def __getstate__(self) -> dict:
        own = {"max_grad_norm": self.max_grad_norm, "master_weights": self.master_weights}
        return {**super().__getstate__(), **own}


def _agree(master: torch.Tensor, weight: torch.Tensor) -> None:
    """The master keeps its extra bits where it still rounds to the weight, and takes the weight where it does not."""
    master.copy_(torch.where(master.to(weight.dtype) == weight, master, weight.to(master.dtype)))
