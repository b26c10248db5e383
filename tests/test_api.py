"""The public names: where they are, what importing them costs, and training from Python."""

import subprocess
import sys
from importlib import resources
from pathlib import Path

import pytest

import rsaft_fast


def test_every_public_name_is_there_and_none_hides_a_subpackage():
    folder = Path(str(resources.files(rsaft_fast)))
    modules = {path.stem for path in folder.iterdir() if path.is_dir() or path.suffix == ".py"}
    assert not modules & set(rsaft_fast.__all__)
    assert all(getattr(rsaft_fast, name) is not None for name in rsaft_fast.__all__)
    assert set(rsaft_fast.__all__) <= set(dir(rsaft_fast))
    with pytest.raises(AttributeError, match="absent"):
        rsaft_fast.absent  # noqa: B018


def test_an_optimizer_alone_imports_no_models():
    code = (
        "import sys; from rsaft_fast import SAM, SAMAdamW, UserError; SAMAdamW; "
        "print([name for name in ('diffusers', 'transformers', 'pydantic', 'matplotlib') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
