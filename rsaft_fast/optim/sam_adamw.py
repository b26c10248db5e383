"""SAMAdamW: SAM and AdamW with restore, unscaling, clipping and update fused into one pass."""

import math

import torch

from rsaft_fast import ops
from rsaft_fast.abi.quantize import MIN_SIZE
from rsaft_fast.distributed.shards import is_sharded, like, local, part_of, shard_number
from rsaft_fast.optim.buckets import LOW_PRECISION, Bucket, Storage
from rsaft_fast.optim.moments import (
    MOMENTS,
    check_shapes,
    decoded_state,
    fit_state,
    load_moments,
    named_state,
    state_names,
    with_strides,
)
from rsaft_fast.optim.offload import OffloadedBucket, Staging
from rsaft_fast.optim.release import GradientRelease
from rsaft_fast.optim.sharpness import IDLE, PERTURBED, SharpnessAware, upload
from rsaft_fast.optim.workers import Replicas, refuse_several_workers


class SAMAdamW(SharpnessAware):
    """Sharpness-aware AdamW (arXiv 2010.01412 around arXiv 1711.05101) that never waits for the device.

    With `perturb()` before `step()` it equals `SAM` around `torch.optim.AdamW`; `step(plain=True)` is
    `torch.optim.AdamW`. Moments are float32 (float64 for float64 weights), or 8-bit. Decoupled weight decay.

    **Master weights.** bf16 weights alone cannot hold a perturbation: at rho 1e-2 and 1e9 parameters, rounding to
    nearest loses about 99 % of it (each element's step is far below half a unit in the last place). With a float32
    master the weights become `round(master + e)`: unbiased (projection 1 on the wanted direction) under rounding
    noise 10 to 20 times rho across it, still below the noise of casting the weights to bf16 at all. The master also
    makes restore exact without a backup, and keeps updates below bf16's resolution. Hence `master_weights=None`
    means True for bf16 and fp16 weights; `False` is for those who accept a perturbation that hardly acts (watch
    `stats()["projection"]`). Weights written by others (`load_state_dict`, an EMA swap) are noticed by version
    counter, or by their place (`param.data = other`), and copied to the master where they differ from it; writes into
    `param.data` are not.

    **Weights that change.** After `model.to(memory_format=...)`, `.to(dtype)`, a cleared `state` or edited groups
    tables are built anew and state follows its weights; 8-bit state is then rounded once more. A gradient in
    another layout than its weight's is copied for the pass.

    **Without a master**, in bf16: `stochastic_rounding=True` makes perturbation and update right in expectation, for
    2 bytes a parameter instead of 6, under noise some times the perturbation (`stats()["applied_over_rho"]`).

    **Memory**, bytes a parameter in bf16 with its gradient: 16 with master and float32 moments; with 8-bit moments and
    stochastic rounding 8.03 for `backup="own"`, 6.03 for `release_gradients=True`: 8-bit AdamW's without SAM.

    **Released gradients.** The fused step runs inside the second backward, one parameter at a time, and frees each
    gradient as it arrives; `step()` only finishes. What changes: `max_grad_norm` clips by the first pass's norm,
    the second one's is never known; non-finite values are looked for in the first pass's gradients and in what
    `check_finite` is given (the loss, or the adjoint) before the backward; an exception inside that backward (out of
    memory, say) leaves a half step: `half_stepped` is then True, and `perturb()` refuses until a checkpoint is
    loaded. Pass 2 must be one backward: no accumulation, no GradScaler, no DDP.

    Args:
        params: parameters, named parameters or groups; groups may set `lr`, `betas`, `eps`, `weight_decay`,
            `rho`, `adaptive`.
        lr: a float, or a scalar tensor (on the device, for CUDA graphs).
        rho: radius of the perturbation, > 0. adaptive: ASAM (arXiv 2102.11600).
        max_grad_norm: clip the second pass's gradient to this global norm, as `torch.nn.utils.clip_grad_norm_`.
        process_group: the squared gradient norm is summed over its ranks, for parameters sharded over them. None: those
            of DTensors (FSDP2) are known; otherwise each worker perturbs by its own gradient, as in the paper
            (m-sharpness).
        state_bits: 32, or 8 for block-quantised moments in bitsandbytes' layout (arXiv 2110.02861): `exp_avg` and
            `exp_avg_sq` hold uint8 codes, `exp_avg_absmax`... a float32 for each 256 elements. Checkpoints of
            either kind, and bitsandbytes', load into either.
        min_8bit_size: smaller parameters keep float32 moments.
        stochastic_rounding: of bf16 weights without a master. seed: its random bits follow from it, from the step and
            from the place of the element alone; a resumed run draws the same.
        backup: where the old bits wait in pass 2 where there is no master: "own" memory, or the first pass's
            "gradient": `perturb()` then takes `p.grad` away.
        release_gradients: see above; implies backup="gradient".
        offload: "state" keeps moments and masters in page-locked host memory and streams them through the device
            during a step (`optim.offload`, which has its price): 8 bytes a parameter saved with float32 moments, 2
            with 8-bit ones, 4 more with a master. The same bits, and the same checkpoints. Not in a CUDA graph.
        static_gradients: a promise that gradients stay where they are: `zero_grad` then fills with zeros, and a pass
            looks at a few parameters instead of all.
        replicas: ranks that hold the same weights (DDP: `torch.distributed.group.WORLD`); a non-finite first pass on
            one makes all of them skip. None: no other worker. False: the same, and no warning where there are workers.

    Raises:
        ValueError: a hyper-parameter out of its range, or options that exclude each other.
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
        *,
        state_bits: int = 32,
        min_8bit_size: int = MIN_SIZE,
        stochastic_rounding: bool = False,
        seed: int = 0,
        backup: str = "own",
        release_gradients: bool = False,
        static_gradients: bool = False,
        offload: str = "none",
    ):
        if max_grad_norm is not None and not max_grad_norm > 0:
            raise ValueError(f"max_grad_norm={max_grad_norm}: it must be positive; None turns clipping off")
        if state_bits not in (8, 32):
            raise ValueError(f"state_bits={state_bits}: moments have 32 or 8 bits")
        if backup not in ("own", "gradient"):
            raise ValueError(f'backup={backup!r}: "own" or "gradient"')
        if offload not in ("none", "state"):
            raise ValueError(f'offload={offload!r}: "none" or "state"')
        if not 0 <= seed < 2**64:
            raise ValueError(f"seed={seed}: from 0 to 2**64 - 1")
        if stochastic_rounding and master_weights:
            raise ValueError("stochastic_rounding with master_weights: a master needs none; choose one")
        if static_gradients and (release_gradients or backup == "gradient"):
            raise ValueError('static_gradients with release_gradients or backup="gradient": those take gradients away')
        if release_gradients and (process_group is not None or replicas):
            raise ValueError("release_gradients with other workers: their gradients arrive too late for it")
        self.max_grad_norm = max_grad_norm
        self.master_weights = master_weights is not False and not stochastic_rounding
        self.state_bits, self.min_8bit_size = state_bits, min_8bit_size
        self.stochastic_rounding, self.seed = stochastic_rounding, seed
        self.backup = "gradient" if release_gradients else backup
        self.release_gradients, self.static_gradients = release_gradients, static_gradients
        self.offload = offload
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
        if self._release is not None and self._phase != IDLE:
            return self._finish_released(self._release)
        self._upload_hyper()
        first = None if self._phase == IDLE else self._first
        inputs = ops.StepInputs(self._scalars, first, self._take_grad_scale(), getattr(self, "found_inf", None))
        for bucket in buckets:
            self._follow_state(bucket)
            bucket.reserve()
        tables = [bucket.table for bucket in buckets]
        ops.global_norm(
            tables, self._no_rho, plain=True, out=self._second, process_group=self._norm_group(), inputs=inputs
        )
        self._stepping = True
        for bucket in buckets:
            bucket.step(self._scalars, first, restore=self._phase == PERTURBED)
        self._stepping = False

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

    # -- released gradients --------------------------------------------------------------------------------------------

    @property
    def half_stepped(self) -> bool:
        """Whether an exception inside an update (a released backward, say) left some parameters updated, others not."""
        return self._half_stepped

    def _refuse_to_step(self) -> None:
        if self._half_stepped:
            raise RuntimeError(
                "the last step was broken off inside its update (or the backward that makes it): some parameters took "
                "it and others did not. Load the model's and the optimizer's last checkpoint"
            )

    def _refuse_to_perturb(self) -> None:
        super()._refuse_to_perturb()
        if self._release is not None and self._release.begun:
            raise RuntimeError("released gradients have been applied: call step() before the next perturb()")

    def _begin_second_pass(self) -> None:
        if self._release is not None:
            self.zero_grad()  # an old gradient would be added to, and then applied
            self._upload_hyper()
            for bucket in self._buckets:
                self._follow_state(bucket)
            self._release.listen()

    def check_finite(self, *tensors: torch.Tensor) -> None:
        """Skip the coming step as a whole if any of these tensors holds a non-finite value; wait for nothing.

        With released gradients nothing else can tell in time: give it the loss, or the gradient that backward begins
        with. Without `release_gradients` the second pass's own norm tells, and this does nothing.

        Raises:
            RuntimeError: not between `perturb()` and the second backward.
        """
        if self.release_gradients:
            self._refuse_unless_perturbed("check_finite()")
            if self._release is not None:  # built by perturb()
                self._release.check_finite(tensors)

    def _put_back(self) -> None:
        if self._release is None:
            super()._put_back()
        else:
            self._release.restore_rest()

    def _abandon(self, error: BaseException) -> None:
        half_done = self._stepping or (self._release is not None and self._release.begun)
        try:
            super()._abandon(error)
        finally:  # putting the weights back may fail, too
            if half_done:
                self._half_stepped, self._stepping, self._phase = True, False, IDLE
                if self._release is not None:
                    self._release.forget()
                for bucket in self._buckets:
                    bucket.close()
                error.add_note("the step was half done: load the model's and the optimizer's last checkpoint")

    def _finish_released(self, release: GradientRelease) -> None:
        if getattr(self, "grad_scale", None) is not None:
            raise RuntimeError(
                "release_gradients with a GradScaler: the gradients were applied before they could be unscaled. Use "
                "bf16, or leave release_gradients out"
            )
        if self._phase == PERTURBED:
            release.restore_rest()
        release.count()
        self._second.values.fill_(math.nan)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear the gradients as `torch.optim` does; with `static_gradients`, always fill them with zeros."""
        super().zero_grad(set_to_none=set_to_none and not self.static_gradients)

    # -- state ---------------------------------------------------------------------------------------------------------

    def _storage_of(self, param: torch.Tensor) -> Storage:
        master = self.master_weights and param.dtype in LOW_PRECISION
        return Storage(
            master=master,
            eight_bit=self.state_bits == 8 and param.numel() >= self.min_8bit_size,
            rounding_seed=self._rounding_seed(param),
            backup=self.backup,
            static=self.static_gradients,
            offload=self.offload == "state",
        )

    def _rounding_seed(self, param: torch.Tensor) -> int | None:
        if not self.stochastic_rounding or param.dtype is not torch.bfloat16:
            return None
        return (self.seed + shard_number(param)) % 2**64  # elements are counted within a shard: others, other bits

    def _kind_of(self, storage: Storage) -> type[Bucket]:
        return OffloadedBucket if storage.offload else Bucket

    def _reset(self) -> None:
        super()._reset()
        self._release: GradientRelease | None = None
        self._half_stepped = self._stepping = False
        self._staging: Staging | None = None
        self._hyper_known: list | None = None

    def _wait_for_host_state(self) -> None:
        """Wait until the host may read or write state whose copies may still be under way."""
        if self._staging is not None:
            self._staging.synchronize()

    def _build(self) -> None:
        super()._build()
        self._hyper_known = None
        if self._release is not None:
            self._release.remove()
            self._release = None
        if self.release_gradients:
            refuse_several_workers()
            self._release = GradientRelease(self._buckets, self._first, self._scalars)

    def _built(self) -> list[Bucket]:
        if self._phase != PERTURBED:
            for bucket in self._buckets:
                self._refresh_masters(bucket)
        return super()._built()

    def _ready(self) -> list[Bucket]:
        # A released pass has no gradients left to bind.
        return self._buckets if self._release is not None and self._phase != IDLE else super()._ready()

    def _refresh_masters(self, bucket: Bucket) -> None:
        """Update masters whose weights others wrote or replaced (`param.data = ...`); a rebuild does the rest."""
        if not bucket.storage.master:
            return
        self._follow_state(bucket)
        for index, (param, weight, version) in enumerate(zip(bucket.params, bucket.weights, bucket.versions)):
            moved = not bucket.table.holds("weight", index, weight)
            if (moved or weight._version != version) and bucket.table.suits(index, weight):
                self._wait_for_host_state()
                _refreshed_master(self.state[param]["master"], weight)
        bucket.remember_versions()

    def _follow_state(self, bucket: Bucket) -> None:
        """Bind state that was cleared, or set to other tensors, since the table learned of it."""
        if bucket.state_replaced(self.state):
            self._bind_state(bucket)

    def _bind_state(self, bucket: Bucket) -> None:
        table, states = bucket.table, [self.state[param] for param in bucket.params]
        master, eight_bit = bucket.storage.master, bucket.storage.eight_bit
        names, perturbed = state_names(master, eight_bit), self._phase == PERTURBED
        if perturbed and master:  # what restoring needs is not for others to replace
            for state, known in zip(states, bucket.known_state("master")):
                state["master"] = known
        if isinstance(bucket, OffloadedBucket):
            self._wait_for_host_state()
            if self._staging is None or self._staging.device != table.device:
                self._staging = Staging(table.device)
            bucket.bind_state(names, states, self._staging)
        else:
            for weight, state in zip(bucket.weights, states):
                fit_state(weight, state, master, eight_bit)
        if master and not perturbed:
            for weight, state in zip(bucket.weights, states):  # loaded, perhaps, before the weights were
                _refreshed_master(state["master"], weight)
        steps = [torch.as_tensor(state.get("step", 0.0), dtype=torch.float32, device=table.device) for state in states]
        table.steps.copy_(torch.stack(steps))
        for state, step in zip(states, table.steps.unbind()):
            state["step"] = step
        bucket.know_state(states, (*names, "step"))
        if not isinstance(bucket, OffloadedBucket):
            table.bind(**{name: [state[name] for state in states] for name in names})

    def state_dict(self) -> dict:
        """Give a state dict as `torch.optim.AdamW`'s, with `master` beside the moments and the count of skipped steps.

        Of DTensor parameters it holds DTensors, parted alike, which `torch.distributed.checkpoint` saves and loads
        on any number of ranks. 8-bit moments are float32 there, for their blocks end where a
        shard does, and are rounded once more when they are loaded.

        Raises:
            RuntimeError: the weights are perturbed.
        """
        self._wait_for_host_state()
        saved = super().state_dict()
        params = [param for group in self.param_groups for param in group["params"]]
        # Step counts are views of one tensor here; formats that refuse shared memory (safetensors) want them apart.
        saved["state"] = {
            key: _whole_state(params[key], {**state, "step": state["step"].clone()})
            for key, state in saved["state"].items()
        }
        return saved

    def allocate_state(self) -> None:
        """Make the state that a first step would make, of zeros: what loads a sharded checkpoint wants it there."""
        self._built()

    def load_state_dict(self, state_dict: dict) -> None:
        """Load a state dict in place, so that a captured graph stays valid.

        Takes a checkpoint of `torch.optim.AdamW` or bitsandbytes' `AdamW8bit` as well: groups keep this optimizer's
        `rho` and `adaptive`, and the master starts from the weights. Moments are converted where their bits differ.
        """
        self._refuse_while_perturbed("load_state_dict()")
        self._wait_for_host_state()
        saved = [index for group in state_dict["param_groups"] for index in group["params"]]
        params = [param for group in self.param_groups for param in group["params"]]
        states = [named_state(state_dict["state"].get(index, {})) for index in saved]
        if len(saved) == len(params):  # else the loader below finds the words
            states = [_local_state(param, state) for param, state in zip(params, states)]
            for param, state in zip(params, states):
                check_shapes(local(param), state)
        own = self.state
        # torch's own loader would cast moments and master to the weight's dtype: it gets the groups only.
        super().load_state_dict({**self._with_defaults(state_dict), "state": {}})
        self.state = own
        for param, state in zip(params, states):
            self._load_param(param, state)
        for bucket in self._buckets:
            bucket.remember_versions()
        self._half_stepped = False
        self._restore_skipped(state_dict)

    def _load_param(self, param: torch.Tensor, saved: dict) -> None:
        state = self.state[param] if saved else self.state.get(param, {})
        if not saved and not state:
            return
        storage, weight = self._storage_of(param), local(param)
        fit_state(weight, state, storage.master, storage.eight_bit, "cpu" if storage.offload else None)
        load_moments(state, saved, storage.eight_bit)
        if storage.master:
            state["master"].copy_(saved.get("master", weight.detach()))
        state.setdefault("step", torch.zeros((), device=weight.device)).copy_(torch.as_tensor(saved.get("step", 0.0)))

    def __getstate__(self) -> dict:
        self._wait_for_host_state()
        return {**super().__getstate__(), **{name: getattr(self, name) for name in _OPTIONS}}


_OPTIONS = (
    "_half_stepped",
    "max_grad_norm",
    "master_weights",
    "state_bits",
    "min_8bit_size",
    "stochastic_rounding",
    "seed",
    "backup",
    "release_gradients",
    "static_gradients",
    "offload",
)
"""What a copied optimizer keeps besides its groups and state."""


def _whole_state(param: torch.Tensor, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Give a parameter's state for a checkpoint: tensors of its shape as the DTensor that it is."""
    if not is_sharded(param):
        return with_strides(state)
    return {
        name: like(param, value) if name in (*MOMENTS, "master") else value
        for name, value in decoded_state(state).items()
    }


def _local_state(param: torch.Tensor, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Give this rank's part of a parameter's state from a checkpoint, of DTensors or of a single process."""
    if not is_sharded(param):
        return state
    return {
        name: part_of(param, value) if name in (*MOMENTS, "master") else value
        for name, value in decoded_state(state).items()
    }


def _refreshed_master(master: torch.Tensor, weight: torch.Tensor) -> None:
    """Keep the master's extra bits where it still rounds to the weight, and take the weight where it does not."""
    here = master.to(weight.device)
    master.copy_(torch.where(here.to(weight.dtype) == weight, here, weight.to(here.dtype)))
