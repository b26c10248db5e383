"""The phases of an update, stated where the work is done: `with phase(SAMPLING):`.

One context variable tells all who ask: the memory estimate, the message of an out-of-memory error, a meter. Of nested
phases the outermost names the work: decoding for the decoder's own backward pass belongs to that.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ContextDecorator, contextmanager, suppress
from contextvars import ContextVar, Token

ENCODING = "encoding prompts"
KEEPING = "encoding prompts for the reward"
CHECKING = "checking the reward's precision"
SAMPLING = "sampling"
GRID = "drawing the sample grid"
SCORING = "decoding and scoring"
DECODER = "the decoder's backward pass"
DENOISER = "the denoiser's backward pass"
PERTURBING = "perturbing the weights"
COMPARING = "comparing gradients"
EVALUATING = "evaluating"
UPDATING = "the optimizer's update"
AVERAGING = "the running mean of the weights"
DENOISING = "the denoising loss"
ANCHORING = "the distance to the base"
REST = "working"
"""Whatever no phase claims."""

_current: ContextVar[str] = ContextVar("phase", default=REST)
_listeners: ContextVar[tuple[Callable[[str], None], ...]] = ContextVar("listeners", default=())


class phase(ContextDecorator):
    """Name the work of a block, or of a function that it decorates; not of a generator, which is left in its middle.

    An exception that leaves the outermost phase carries its name: `phase_of` reads it.
    """

    def __init__(self, name: str):
        self.name = name
        self._token: Token[str] | None = None

    def _recreate_cm(self) -> phase:
        return phase(self.name)  # a decorated function may call itself

    def __enter__(self) -> phase:
        if _current.get() == REST:
            self._token = _current.set(self.name)
            _tell(self.name)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        if self._token is None:
            return
        _current.reset(self._token)
        self._token = None
        if error is not None:
            with suppress(AttributeError):  # of a class without room for it
                error.rsaft_phase = self.name  # type: ignore[attr-defined]
        _tell(REST)


def current_phase() -> str:
    """Return the phase that the caller works in; `REST` outside all of them."""
    return _current.get()


def phase_of(error: BaseException) -> str:
    """Return the phase that raised an exception; `REST` where none did."""
    return getattr(error, "rsaft_phase", REST)


@contextmanager
def listening(begin: Callable[[str], None]) -> Iterator[None]:
    """Call `begin` with the name of each phase as it begins inside the block, and with `REST` as it ends."""
    token = _listeners.set((*_listeners.get(), begin))
    try:
        yield
    finally:
        _listeners.reset(token)


def _tell(name: str) -> None:
    for begin in _listeners.get():
        begin(name)
