"""Launching past Triton's dispatch: the launches that the dispatch would have made, whatever the arguments.

Compiled for real, launched into a driver that writes down what it is asked to launch.
"""

import gc
import os
from types import SimpleNamespace

import pytest
import torch

from rsaft_fast.ops import GradientNorm, StepInputs, StepScalars, TensorTable

triton = pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1" or torch.cuda.is_available():
    pytest.skip("needs the compiler and no device: on a device the GPU tests launch", allow_module_level=True)

from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.runtime import driver  # noqa: E402

from rsaft_fast import kernels  # noqa: E402
from rsaft_fast.kernels import coefficients, common, global_norm, perturb_images, sam_adamw, sam_perturb, sam_restore  # noqa: E402  # noqa: E402

MODULES = (coefficients, global_norm, perturb_images, sam_adamw, sam_perturb, sam_restore)


class Driver:
    """As much of a device as compiling and launching ask for. Notes each launch's compiled form, grid and arguments."""

    def __init__(self):
        self.launches = []
        self.arguments = []  # of all launches, as they were given
        self.utils = SimpleNamespace(
            load_binary=lambda *_: (1, 2, 64, 0, 1024),
            unload_module=lambda _: None,
            get_device_properties=lambda _: {"max_shared_mem": 232448},
        )

    def launcher_cls(self, source, metadata):
        form = object()

        def launch(*arguments):
            grid_and_stream, own = arguments[:4], arguments[9:]
            self.arguments += own
            self.launches.append((source.name, form, grid_and_stream, tuple(map(identity, own))))

        return launch

    get_current_target = staticmethod(lambda: GPUTarget("cuda", 90, 32))
    get_current_device = staticmethod(lambda: 0)
    get_current_stream = staticmethod(lambda device: 7)


def identity(argument):
    """Tensors by address, as launches after the first pass them."""
    return argument.data_ptr() if isinstance(argument, torch.Tensor) else argument


@pytest.fixture
def device(monkeypatch):
    recording = Driver()
    monkeypatch.setattr(driver, "_active", recording)
    common.launcher.cache_clear()
    yield recording
    common.launcher.cache_clear()
    for module in MODULES:
        for value in vars(module).values():
            if isinstance(value, triton.JITFunction):
                value.device_caches.clear()
    gc.collect()  # while there is something to unload from


def operations():
    """Calls whose arguments differ in all that Triton would specialise on: ones, multiples of 16, alignment."""
    lists = ("grad", "backup", "exp_avg", "exp_avg_sq")
    for size, tensors, groups in ((40000, 16, 1), (1, 1, 2), (33, 5, 1)):
        t = TensorTable([torch.zeros(size) for _ in range(tensors)])
        t.bind(**{name: [torch.zeros(size) for _ in range(tensors)] for name in lists})
        norm, scalars = GradientNorm("cpu", groups), StepScalars("cpu", groups)
        rho, scale = torch.zeros(groups, dtype=torch.float64), torch.ones(3)[tensors % 3]
        inputs = StepInputs(scalars, GradientNorm("cpu"), scale, norm.found_inf)
        yield kernels.sum_of_squares, t, False
        yield kernels.finish_norm, [t.sum_sq, t.sum_sq], norm, rho
        yield kernels.finish_norm, [t.sum_sq], norm, rho, [t], inputs
        yield kernels.adamw_coefficients, [t, t], norm, StepInputs(scalars)
        yield kernels.sam_perturb_, t, norm
        yield kernels.sam_adamw_step_, t, scalars, norm, True
        yield kernels.sam_adamw_step_, t, scalars, norm, True, tensors - 1, t["grad"][0]
        yield kernels.sam_restore_, t, norm, 0
    for samples, elements, offset in ((2, 48, 0), (3, 1, 0), (1, 17, 0), (2, 48, 1)):
        images = torch.zeros(samples * elements + offset)[offset:].view(samples, elements)
        yield kernels.step_against_, torch.zeros_like(images), images, images, 0.1, "l2"


def recorded(device, calls) -> list:
    device.launches.clear()
    for function, *arguments in calls:
        function(*arguments)
    return list(device.launches)


def test_every_launch_is_the_one_that_triton_would_have_made(device, monkeypatch):
    calls = list(operations())
    made = {}  # what a call makes for itself: the same memory every time
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *size, **how: made.setdefault(size, empty(*size, **how)))
    recorded(device, calls)  # compiles
    direct = recorded(device, calls)
    dispatched = lambda self, grid, *arguments: self.kernel[grid](*arguments, **self.constants)  # noqa: E731
    monkeypatch.setattr(common.Launcher, "__call__", dispatched)
    assert direct == recorded(device, calls) and len(direct) > len(calls)


def test_no_launch_but_the_first_passes_a_tensor(device):
    """Triton would ask the driver where each of them is, in every launch."""
    calls = list(operations())
    recorded(device, calls)
    assert any(isinstance(argument, torch.Tensor) for argument in device.arguments)
    device.arguments.clear()
    recorded(device, calls)
    assert device.arguments and not any(isinstance(argument, torch.Tensor) for argument in device.arguments)


def test_one_compiled_form_serves_tensors_of_any_size(device):
    forms = {}
    for name, form, *_ in recorded(device, operations()):
        forms.setdefault(name, set()).add(form)
    # More than one: first or last slots, counting or not; images whose samples are aligned and others.
    several = {"rsaft_finish_norm_kernel": 2, "rsaft_adamw_coefficients_kernel": 2}
    several |= {"rsaft_sample_sums_kernel": 2, "rsaft_perturb_images_kernel": 2}
    assert {name: len(kinds) for name, kinds in forms.items()} == {name: several.get(name, 1) for name in forms}


def test_the_second_launch_does_not_ask_triton(device, monkeypatch):
    calls = list(operations())
    recorded(device, calls)
    monkeypatch.setattr(triton.JITFunction, "run", lambda *_, **__: pytest.fail("went through Triton's dispatch"))
    assert recorded(device, calls)
