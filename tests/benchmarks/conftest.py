"""The GPU suite runs this folder also where only torch is installed."""

from importlib.util import find_spec

_NEEDED = ("diffusers", "transformers", "pydantic", "peft")
collect_ignore = [] if all(map(find_spec, _NEEDED)) else ["test_gpu_memory.py", "test_plain_step.py"]
