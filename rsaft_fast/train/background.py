"""Writing beside the training: a thread that runs what it is handed, in order."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable


class BackgroundWriter:
    """Runs jobs one after the other in a thread of its own, which starts with the first.

    A job that fails does not stop the ones after it; its error is raised by the next call here, once.
    """

    def __init__(self, most_waiting: int = 4):
        """`most_waiting`: jobs that may wait (each may hold a grid's pictures); a further one waits for its place."""
        self._jobs: queue.Queue[Callable[[], object] | None] = queue.Queue(most_waiting)
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def submit(self, job: Callable[[], object]) -> None:
        """Have it run soon.

        Raises:
            BaseException: what an earlier job failed with.
        """
        self._surface()
        if self._thread is None:
            self._thread = threading.Thread(target=self._work, name="rsaft-fast writer", daemon=True)
            self._thread.start()
        self._jobs.put(job)

    def flush(self) -> None:
        """Wait until all that was handed over is done.

        Raises:
            BaseException: what one of it failed with.
        """
        self._jobs.join()
        self._surface()

    def close(self) -> None:
        """`flush`, and end the thread."""
        if self._thread is not None:
            self._jobs.put(None)
            self._thread.join()
            self._thread = None
        self._surface()

    def _work(self) -> None:
        while (job := self._jobs.get()) is not None:
            try:
                job()
            except BaseException as error:  # it belongs to the thread that handed the job over
                self._error = self._error or error
            finally:
                self._jobs.task_done()
        self._jobs.task_done()

    def _surface(self) -> None:
        error, self._error = self._error, None
        if error is not None:
            raise error
