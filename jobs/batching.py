"""Dynamic batching: what several clients ask at one time is answered by one forward pass."""

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass

import numpy as np

Score = Callable[[Sequence[str]], np.ndarray]

MOST_WAITING = 100_000
"""Texts that may wait, of one request or of many. More are turned away, which bounds the wait; it bounds memory only
where texts are short, since one may be as long as a request."""


class Overloaded(Exception):
    """Too many texts wait already."""


@dataclass(frozen=True, eq=False)
class _Request:
    texts: Sequence[str]
    answer: asyncio.Future[np.ndarray]


class Batcher:
    """Answers requests in the order in which they came, several at a time, on one thread beside the event loop.

    A pass takes what is waiting, up to about `max_batch` texts; if that is less, it first waits `max_wait_seconds` for
    more. While one pass runs, the next batch gathers.
    """

    def __init__(self, score: Score, max_batch: int, max_wait_seconds: float) -> None:
        self._score, self._max_batch, self._max_wait_seconds = score, max_batch, max_wait_seconds
        self._requests: asyncio.Queue[_Request] = asyncio.Queue()
        self._waiting = 0
        self._thread = ThreadPoolExecutor(1, "score")

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Answers are given within this block."""
        task = asyncio.create_task(self._run())
        try:
            yield
        finally:
            task.cancel()
            self._thread.shutdown()

    async def answer(self, texts: Sequence[str]) -> np.ndarray:
        """What `score` says of the texts, row by row. Raises Overloaded, or what `score` raises.

        More than MOST_WAITING at once are never answered.
        """
        if self._waiting + len(texts) > MOST_WAITING:
            raise Overloaded
        request = _Request(texts, asyncio.get_running_loop().create_future())
        self._waiting += len(texts)
        try:
            self._requests.put_nowait(request)
            return await request.answer
        finally:
            self._waiting -= len(texts)

    async def _run(self) -> None:
        while True:
            batch = await self._gathered()
            if not await self._answered(batch) and len(batch) > 1:
                for request in batch:  # one of them may be what cannot be answered
                    await self._answered([request])

    async def _gathered(self) -> list[_Request]:
        batch = [await self._requests.get()]
        deadline = asyncio.get_running_loop().time() + self._max_wait_seconds
        while sum(len(request.texts) for request in batch) < self._max_batch:
            try:
                async with asyncio.timeout_at(deadline):
                    batch.append(await self._requests.get())
            except TimeoutError:
                break
        return batch

    async def _answered(self, batch: Sequence[_Request]) -> bool:
        """Whether the batch could be scored. A failure is told to the client where it can only be its own."""
        texts = [text for request in batch for text in request.texts]
        try:
            rows = await asyncio.get_running_loop().run_in_executor(self._thread, self._score, texts)
        except Exception as error:  # noqa: BLE001 -- whatever it is, it is raised where the answer is awaited
            if len(batch) == 1 and not batch[0].answer.done():
                batch[0].answer.set_exception(error)
            return False
        begin = 0
        for request in batch:
            if not request.answer.done():  # its client may be gone
                request.answer.set_result(rows[begin : begin + len(request.texts)])
            begin += len(request.texts)
        return True
