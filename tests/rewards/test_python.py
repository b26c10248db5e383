"""Rewards that a recipe names by module:name, right and wrong."""

from __future__ import annotations

import itertools
import sys
from pathlib import Path

import pytest
import torch

from rsaft_fast.errors import UserError
from rsaft_fast.rewards import RewardSettings, load_reward
from rsaft_fast.rewards.python import handed_over

NUMBERS = itertools.count()
HEAD = """
import torch
from rsaft_fast.rewards import Reward, RewardSpec

class Mine(Reward):
    def __init__(self, gain: float = 1.0, spec=None):
        super().__init__()
        self.gain = torch.nn.Parameter(torch.tensor(gain))
        self.dropout = torch.nn.Dropout(0.5)
        if spec:
            self.spec = RewardSpec("mine", sha256=spec)
    def score(self, images, prompts):
        return self.dropout(images).mean((1, 2, 3)) * self.gain
"""


@pytest.fixture
def write(tmp_path, monkeypatch):
    """Writes a module into the current folder under a name that no other has; gives the name."""
    monkeypatch.chdir(tmp_path)
    name = f"a_reward_of_mine_{next(NUMBERS)}"

    def write(code: str) -> str:
        Path(f"{name}.py").write_text(HEAD + code)
        return name

    yield write
    sys.modules.pop(name, None)


IMAGES = torch.rand(2, 3, 6, 6, generator=torch.Generator().manual_seed(0))
MEAN = IMAGES.mean((1, 2, 3))


@pytest.mark.parametrize(
    ("code", "arguments"),
    [
        ("def f(images, prompts): return images.mean((1, 2, 3)) * 3", {}),
        ("def f(images, prompts, *, gain): return images.mean((1, 2, 3)) * gain", {"gain": 3.0}),
        (
            "class Callable:\n  def __call__(self, images, prompts): return images.mean((1, 2, 3)) * 3\nf = Callable()",
            {},
        ),
        ("f = Mine", {"gain": 3.0}),
        ("f = Mine(3.0)", {}),
        ("def f(*, times=1.0) -> Mine: return Mine(times)", {"times": 3.0}),
    ],
)
def test_functions_classes_objects_and_factories(write, code, arguments):
    module = write(code)
    reward = load_reward("python", f"{module}:f", arguments=arguments)
    images = IMAGES.clone().requires_grad_()
    score = reward.score(images, ["a", "b"])
    torch.testing.assert_close(score, 3 * MEAN)
    (gradient,) = torch.autograd.grad(score.sum(), images)
    torch.testing.assert_close(gradient, torch.full_like(images, 3 / 108))
    assert not any(p.requires_grad for p in reward.parameters())
    assert reward.spec.source == f"{module}:f" and len(reward.spec.sha256) == 64
    settings = RewardSettings(name="python", path=f"{module}:f", arguments=arguments)
    assert settings.shapes(print).score(images.to("meta"), ["a", "b"]).shape == (2,)


def test_what_it_is_is_its_code_and_its_weights(write):
    module = write("f = Mine\ndef g(images, prompts): return images.mean((1, 2, 3))")
    digests = {load_reward("python", f"{module}:{name}", arguments=arguments).spec.sha256
               for name, arguments in (("f", {}), ("g", {}), ("f", {"spec": "x"}), ("f", {"spec": "y"}))}  # fmt: skip
    assert len(digests) == 3


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("nowhere_at_all:f", ["nowhere_at_all", "PYTHONPATH"]),
        ("{}", ["module:callable"]),
        ("owner/name:f", ["module:callable"]),
        ("{}:absent", ["absent", "nothing of that name"]),
        ("{}:three", ["has a int of that name"]),
        ("{}:broken", ["returned a int"]),
        ("{}:raises", ["ZeroDivisionError"]),
        # Nothing that is not a reward by its own word is ever called.
        ("os:system", ["builtin_function_or_method system"]),
        ("subprocess:run", ["function run"]),
        ("subprocess:Popen", ["class Popen"]),
    ],
)
def test_what_cannot_be_loaded_is_one_clear_line(write, path, words):
    module = write("three = 3\ndef broken() -> Mine: return 3\ndef raises() -> Mine: 1 / 0")
    arguments = {"args": "touch executed", "command": "touch executed"} if path.startswith(("os", "sub")) else {}
    with pytest.raises(UserError) as caught:
        load_reward("python", path.format(module), arguments=arguments)
    assert all(word in str(caught.value) for word in words) and "\n" not in str(caught.value)
    assert not Path("executed").exists()


@pytest.mark.parametrize(
    ("code", "words"),
    [("import no_such_package", ["needs 'no_such_package'"]), ("1 / 0", ["ZeroDivisionError"]), (")", ["SyntaxError"])],
)
def test_a_module_that_does_not_import_says_why(write, code, words):
    module = write(code)
    with pytest.raises(UserError) as caught:
        load_reward("python", f"{module}:f")
    assert all(word in str(caught.value) for word in (module, *words))


@pytest.mark.parametrize(
    ("returned", "words"),
    [
        ("images.mean()", ["shape () in float32", "shape (2,)"]),
        ("images.mean((2, 3))", ["shape (2, 3)", "shape (2,)"]),
        ("[1.0, 2.0]", ["a list", "shape (2,)"]),
        ("torch.zeros(2, dtype=torch.int64)", ["int64"]),
        ("images.detach().mean((1, 2, 3))", ["no gradient", "reward.differentiable=false"]),
    ],
)
def test_scores_that_are_none_are_one_clear_line(write, returned, words):
    module = write(f"def f(images, prompts): return {returned}")
    reward = load_reward("python", f"{module}:f")
    with pytest.raises(UserError) as caught:
        reward.score(IMAGES.clone().requires_grad_(), ["a", "b"])
    assert all(word in str(caught.value) for word in (*words, module))
    if "no gradient" in words:
        scored = load_reward("python", f"{module}:f", differentiable=False)
        assert not scored.score(IMAGES.clone().requires_grad_(), ["a", "b"]).requires_grad


def test_what_its_code_raises_is_one_clear_line(write):
    path = write("def f(images, prompts): return {'a': images}[prompts[0]]") + ":f"
    with pytest.raises(UserError, match=f"{path}.* 1 .*KeyError: 'b'") as error:
        load_reward("python", path).score(torch.rand(1, 3, 8, 8), ["b"])
    assert isinstance(error.value.__cause__, KeyError)

    def too_much(images, prompts):
        raise torch.OutOfMemoryError("out of memory")

    with pytest.raises(torch.OutOfMemoryError):  # whose phase is named elsewhere
        handed_over(too_much)[0].score(torch.rand(1, 3, 8, 8), ["b"])


def test_a_reward_that_is_not_begun_as_a_module_is_one_clear_line(write):
    path = write("class Bare(Mine):\n    def __init__(self): self.limit = 1\n") + ":Bare"
    with pytest.raises(UserError, match=rf"{path}.*super\(\)"):
        load_reward("python", path)


def test_an_unknown_name_is_answered_with_the_nearest():
    with pytest.raises(UserError, match="'pickscor'.* pickscore\\?"):
        load_reward("pickscor")


def test_arguments_and_differentiability_must_fit(write):
    module = write(
        "def f(images, prompts, power): return images.mean((1, 2, 3)) ** power\nclass G(Mine): differentiable=False"
    )
    for arguments, words in (({}, "power"), ({"power": 1, "pover": 2}, "pover")):
        with pytest.raises(UserError, match=words):
            load_reward("python", f"{module}:f", arguments=arguments)
    with pytest.raises(UserError, match="reward.differentiable is True, but .* says False"):
        load_reward("python", f"{module}:G")
    assert not load_reward("python", f"{module}:G", differentiable=False).differentiable


def test_code_that_reads_values_is_not_estimated(write):
    module = write("def f(images, prompts): return images.mean((1, 2, 3)) * images.max().item()")
    with pytest.raises(UserError, match=f"{module}:f cannot be estimated.*shapes alone"):
        RewardSettings(name="python", path=f"{module}:f").shapes(print)


def test_an_object_is_the_same_reward_however_often_it_is_loaded(write):
    name = write('f = Mine(3.0, spec="of its weights")')
    settings = RewardSettings(name="python", path=f"{name}:f")
    first, shapes, again = settings.load(), settings.shapes(lambda line: None), settings.load()
    assert shapes.gain.is_meta and not again.gain.is_meta
    assert first.spec == again.spec and first.spec.sha256 not in ("", "of its weights")
    own = sys.modules[name].f
    assert own.spec.sha256 == "of its weights" and own.gain.requires_grad and own.training
