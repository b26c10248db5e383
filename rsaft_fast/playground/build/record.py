"""Record of a build beside the weights: build.json with settings, losses, timings, versions and file hashes."""

import json
import platform
import time
from importlib.metadata import version
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from rsaft_fast.files import sha256_of, write_atomically

PACKAGES = ("torch", "diffusers", "transformers", "safetensors", "numpy")


class Log:
    """Log of one stage's losses and results, which prints them as they come."""

    def __init__(self, name: str, every: int = 100):
        self.name, self.every = name, every
        self.losses: list[dict[str, float]] = []
        self.results: dict[str, object] = {}
        self._sums: dict[str, float] = {}
        self._since = 0
        self._start = time.time()

    def step(self, step: int, **values: torch.Tensor) -> None:
        """Add to running means, which are kept every `every` steps."""
        for key, value in values.items():
            self._sums[key] = self._sums.get(key, 0.0) + float(value.detach())
        self._since += 1
        if (step + 1) % self.every == 0:
            row = {"step": step + 1} | {key: round(total / self._since, 6) for key, total in self._sums.items()}
            self.losses.append(row)
            self._sums, self._since = {}, 0
            print(f"{self.name} {row} {time.time() - self._start:.0f} s", flush=True)

    def result(self, **values: object) -> None:
        self.results |= values
        print(f"{self.name} {values} {time.time() - self._start:.0f} s", flush=True)

    def state_dict(self) -> dict[str, object]:
        """Give what a run that goes on after a break has to know."""
        kept = {key: value for key, value in vars(self).items() if key != "_start"}
        return kept | {"elapsed": time.time() - self._start}

    def load_state_dict(self, state: dict[str, object]) -> None:
        state = dict(state)
        self._start = time.time() - state.pop("elapsed")
        vars(self).update(state)

    def summary(self) -> dict[str, object]:
        return {"losses": self.losses, "results": self.results, "seconds": round(time.time() - self._start, 1)}


def store_half(folder: Path) -> None:
    """Rewrite the weight files under `folder` in fp16; their configs go on saying fp32, so they load as fp32."""
    for path in sorted(folder.rglob("*.safetensors")):
        tensors = load_file(path)
        halved = {key: t.half() if t.is_floating_point() else t for key, t in tensors.items()}
        save_file(halved, path, metadata={"format": "pt"})
        path.chmod(0o644)


def forget_origin(folder: Path) -> None:
    """Remove the path that a component was once loaded from out of the configs under `folder`."""
    for path in sorted(folder.rglob("*.json")):
        config = json.loads(path.read_text())
        if config.pop("_name_or_path", None) is not None:
            path.write_text(json.dumps(config, indent=2) + "\n")


def hashes(folder: Path) -> dict[str, str]:
    """Compute the SHA-256 of every file under `folder` but build.json, by relative path."""
    files = (path for path in sorted(folder.rglob("*")) if path.is_file() and path.stem != "build")
    return {path.relative_to(folder).as_posix(): sha256_of([path]) for path in files}


def update(assets: Path, settings: dict[str, object], stages: dict[str, object]) -> None:
    """Write build.json: settings, stages' logs, versions and the assets' hashes, in one rename.

    A stage whose log is empty was not run here; what build.json says of it stays.
    """
    path = assets / "build.json"
    before = json.loads(path.read_text())["stages"] if path.exists() else {}
    stages = {stage: log or before.get(stage) for stage, log in stages.items() if log or stage in before}
    record = {
        "settings": settings,
        "stages": stages,
        "versions": {"python": platform.python_version()} | {name: version(name) for name in PACKAGES},
        "processor": {"machine": platform.machine(), "features": torch.backends.cpu.get_cpu_capability()},
        "files": hashes(assets),
    }
    write_atomically(path, json.dumps(record, indent=1, sort_keys=True) + "\n")
