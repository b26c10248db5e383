"""Work beside the main thread's: a thread that runs what it is handed, in order."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from contextlib import suppress


class Background:
    """Runs jobs one after the other in a thread of its own, which starts with the first.

    A job that fails does not stop the ones after it; its error is raised by the next call here, once.
    """

    def __init__(self, name: str, most_waiting: int = 4):
        """
        Args:
            name: of the thread.
            most_waiting: jobs that may wait (each may hold pictures); a further one waits for its place.
        """
        self._jobs: queue.Queue[Callable[[], object] | None] = queue.Queue(most_waiting)
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None
        self._name = name

    def __enter__(self) -> Background:
        return self

    def __exit__(self, kind: type[BaseException] | None, *exc: object) -> None:
        """`close`; after an exception, `abandon`."""
        if kind is None:
            self.close()
        else:
            self.abandon()

    def submit(self, job: Callable[[], object]) -> None:
        """Have it run soon.

        Raises:
            BaseException: what an earlier job failed with.
        """
        self._surface()
        if self._thread is None:
            self._thread = threading.Thread(target=self._work, name=f"rsaft-fast {self._name}", daemon=True)
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

    def abandon(self) -> None:
        """End the thread when its present job is done, without waiting for that: something else went wrong."""
        if self._thread is not None:
            with suppress(queue.Empty):
                while True:
                    self._jobs.get_nowait()
                    self._jobs.task_done()
            self._jobs.put(None)
            self._thread = None

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
