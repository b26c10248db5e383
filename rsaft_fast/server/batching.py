"""Batching of requests: those that wait together go through the reward together."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections import deque
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch

from rsaft_fast.rewards.base import Reward
from rsaft_fast.server.bodies import Busy

log = logging.getLogger(__name__)
# Prompts that were looked at for what is cut.
_REMEMBERED = 8192


@dataclass(eq=False)
class _Job:
    images: torch.Tensor
    prompts: Sequence[str]
    scores: asyncio.Future[torch.Tensor]

    @property
    def kind(self) -> tuple:
        """Shape and dtype of a picture, which jobs must share to be scored in one call."""
        return self.images.shape[1:], self.images.dtype


class Batcher:
    """Queue of one reward: one call at a time, in a thread beside the event loop.

    Nobody waits for company: a call takes what has arrived during the one before it. A request that comes alone is
    scored alone, so its scores are bit for bit those of a local call; in company they may differ by rounding.
    """

    def __init__(
        self,
        reward: Reward,
        device: torch.device,
        executor: ThreadPoolExecutor,
        max_pictures: int,
        max_waiting: int,
    ):
        """`executor` may be shared: with one thread, several rewards take turns on one device."""
        self.reward, self.device, self.executor = reward, device, executor
        self.max_pictures, self.max_waiting = max_pictures, max_waiting
        self._waiting: deque[_Job] = deque()
        self._noted: set[str] = set()
        self._arrived = asyncio.Event()

    async def score(self, images: torch.Tensor, prompts: Sequence[str]) -> torch.Tensor:
        """Score pictures when their turn comes: (B,) on the CPU.

        Raises:
            Busy: `max_waiting` requests wait already.
        """
        if len(self._waiting) >= self.max_waiting:
            raise Busy(f"{len(self._waiting)} requests wait already")
        job = _Job(images, prompts, asyncio.get_running_loop().create_future())
        self._waiting.append(job)
        self._arrived.set()
        try:
            return await job.scores
        finally:
            # Whoever gave up waiting shall not be computed for.
            with contextlib.suppress(ValueError):
                self._waiting.remove(job)

    async def run(self) -> None:
        """Serve until cancelled; those who still wait then get `Busy`."""
        try:
            while True:
                await self._arrived.wait()
                self._arrived.clear()
                while jobs := self._take():
                    await self._serve(jobs)
        finally:
            for job in self._waiting:
                _settle(job, Busy("the server is shutting down"))

    def _take(self) -> list[_Job]:
        """Take the longest waiting job, and others of its kind that fit into one call with it."""
        jobs: list[_Job] = []
        room = self.max_pictures
        for job in list(self._waiting):
            if not jobs or (job.kind == jobs[0].kind and len(job.images) <= room):
                jobs.append(job)
                room -= len(job.images)
                self._waiting.remove(job)
        return jobs

    async def _serve(self, jobs: list[_Job]) -> None:
        loop = asyncio.get_running_loop()
        try:
            scores = await loop.run_in_executor(self.executor, self._score, jobs)
        except Exception as error:
            if len(jobs) == 1:
                _settle(jobs[0], error)
                return
            # One of them spoils the call: each by itself, so that the others are served.
            for job in jobs:
                await self._serve([job])
            return
        for job, part in zip(jobs, scores.split([len(job.images) for job in jobs])):
            _settle(job, part)

    @torch.no_grad()
    def _score(self, jobs: list[_Job]) -> torch.Tensor:
        images = torch.cat([job.images for job in jobs]).to(self.device)
        prompts = [prompt for job in jobs for prompt in job.prompts]
        scores = self.reward.score(images, prompts).cpu()
        self._note_cut(prompts)
        return scores

    def _note_cut(self, prompts: Sequence[str]) -> None:
        """Log which prompts the reward does not read to their end, each once while it is remembered."""
        new = [prompt for prompt in dict.fromkeys(prompts) if prompt not in self._noted]
        if len(self._noted) + len(new) > _REMEMBERED:
            self._noted.clear()
        self._noted.update(new)
        for note in self.reward.prompt_notes(new) if new else ():
            log.warning("%s", note)


def _settle(job: _Job, result: torch.Tensor | Exception) -> None:
    if job.scores.done():  # the client has gone
        return
    if isinstance(result, Exception):
        job.scores.set_exception(result)
    else:
        job.scores.set_result(result)
