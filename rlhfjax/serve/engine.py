"""The engine: one thread that owns the device, and requests that join and leave a running batch.

A turn of the thread: end what was cancelled, give free lanes to queued requests, begin one chunk of
one prompt and one decode step of all lanes that have their prompt, and emit the tokens of the step
before while the device computes. So a long prompt delays the others by one chunk per token, and the
device waits only for a few lines of Python between two steps.
"""

import collections
import logging
import math
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future
from typing import Any, NamedTuple

import jax
import numpy as np

from rlhfjax.errors import ConfigError, first_line
from rlhfjax.models.lora import Params
from rlhfjax.models.transformer import Model
from rlhfjax.sampling.lanes import Drawn, Settings, words
from rlhfjax.serve.device import EVERY_ID, Device
from rlhfjax.serve.jobs import Lane, Ticket, best_lane, best_source, packed_mask
from rlhfjax.serve.programs import Step, unpack
from rlhfjax.serve.requests import (
    Closed,
    Emit,
    End,
    Event,
    Full,
    Request,
    validate_request,
)

log = logging.getLogger("rlhfjax")
CANCELLED = End("cancelled")


class Stats(NamedTuple):
    """What an engine does, and has done since it began."""

    lanes: int
    busy: int  # lanes with a request
    queued: int  # requests that wait for a lane
    steps: int  # decode steps
    prompt_tokens: int  # of all requests that had a lane
    reused_tokens: int  # those of them that were in the cache already
    response_tokens: int


class Engine:
    """Serves many requests at a time from one model.

    A response depends on its request alone, to the rounding of sums: not on what else is running,
    nor on what the lane ran before.

    Args:
      params: of a language model, perhaps quantized or with adapters.
      lanes: number of responses that are decoded at a time.
      length: tokens of prompt and response together, at most; None: the model's context.
      chunk: tokens of a prompt that are run between two decode steps, at most.
      queue: number of requests that may wait for a lane.

    Raises:
      ConfigError: a size is out of its range, or the cache needs more memory than there is.
    """

    def __init__(
        self,
        model: Model,
        params: Params,
        *,
        lanes: int = 8,
        length: int | None = None,
        chunk: int = 64,
        queue: int = 64,
    ):
        if queue < 1:
            raise ConfigError(f"queue={queue}: must be >= 1")
        length = model.config.max_length if length is None else length
        self._device = Device(model, params, lanes, length, chunk)
        self._vocab_size, self._most_queued = model.config.vocab_size, queue
        self._lanes = [Lane(index) for index in range(lanes)]
        self._events: list[tuple[Ticket, Event]] = []
        self._settings_changed = True
        self._taken = self._steps = 0
        self._prompt_tokens = self._reused_tokens = self._response_tokens = 0
        # What other threads write, under the lock of `_changed`.
        self._changed = threading.Condition()
        self._queue: collections.deque[Ticket] = collections.deque()
        self._calls: collections.deque[Callable[[], None]] = collections.deque()
        self._closes_at: float | None = None
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    @property
    def length(self) -> int:
        """Tokens of prompt and response together, at most."""
        return self._device.length

    # ------------------------------------------------------------------ for any thread

    def submit(self, request: Request, emit: Emit) -> Ticket:
        """Queues a request.

        Args:
          emit: is called from the engine's thread with each event; it must return soon.

        Raises:
          ConfigError: the request is invalid, or longer than there is room for.
          Full: too many requests wait for a lane.
          Closed: the engine takes no more requests.
        """
        validate_request(request, self.length, self._vocab_size)
        ticket = Ticket(request, emit, self._wake)
        with self._changed:
            if self._closes_at is not None:
                raise Closed("the engine is shutting down")
            if len(self._queue) >= self._most_queued:
                raise Full(f"{self._most_queued} requests are waiting already")
            self._queue.append(ticket)
            self._changed.notify()
        return ticket

    def warm_up(self) -> None:
        """Compiles every program. Nothing is compiled after it, whatever is submitted."""
        done: Future[None] = Future()

        def call() -> None:
            try:
                self._put_settings()
                self._device.compile()
                done.set_result(None)
            except BaseException as error:
                done.set_exception(error)

        with self._changed:
            if self._closes_at is not None:
                raise Closed("the engine is shutting down")
            self._calls.append(call)
            self._changed.notify()
        done.result()

    def stats(self) -> Stats:
        """Returns what the engine does."""
        return Stats(
            lanes=len(self._lanes),
            busy=len(self._busy()),
            queued=len(self._queue),
            steps=self._steps,
            prompt_tokens=self._prompt_tokens,
            reused_tokens=self._reused_tokens,
            response_tokens=self._response_tokens,
        )

    def close(self, seconds: float = 0.0) -> None:
        """Takes no more requests, and returns when all have ended.

        Args:
          seconds: how long they may go on; those that have not ended then are cancelled.
        """
        with self._changed:
            self._closes_at = time.monotonic() + seconds
            self._changed.notify()
        self._thread.join()

    def __enter__(self) -> "Engine":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _wake(self) -> None:
        with self._changed:
            self._changed.notify()

    # ------------------------------------------------------------------ the thread

    def _run(self) -> None:
        while self._wait():
            try:
                self._turn()
            except Exception as error:
                self._fail(error)

    def _wait(self) -> bool:
        """Waits until there is something to do. Returns False when the engine has ended."""
        with self._changed:
            while not (self._events or self._queue or self._calls or self._busy()):
                if self._closes_at is not None:
                    return False
                self._changed.wait()
        return True

    def _turn(self) -> None:
        while self._calls:
            self._calls.popleft()()
        self._end_cancelled()
        self._admit()
        scored = self._begin_chunk()
        decoding, packed = self._begin_step()
        self._flush()
        if scored is not None:
            lane, count, rows = scored
            lane.score(unpack(rows), count)
        self._end_prompts()
        if packed is not None:
            # The row of a lane that was run alone is the only one.
            rows = np.broadcast_to(packed, (len(self._lanes), packed.shape[1]))
            self._collect(decoding, unpack(rows))
        else:
            # Else all chunks of a prompt would be begun at once, before any other request.
            self._device.wait()

    def _end_cancelled(self) -> None:
        closes = self._closes_at
        is_over = closes is not None and time.monotonic() >= closes
        for lane in self._busy():
            assert lane.ticket is not None
            if is_over or lane.ticket.is_cancelled:
                self._end(lane, CANCELLED)
        with self._changed:
            waiting = list(self._queue)
            ended = [t for t in waiting if is_over or t.is_cancelled]
            for ticket in ended:
                self._queue.remove(ticket)
        self._events += [(ticket, CANCELLED) for ticket in ended]

    def _admit(self) -> None:
        """Gives free lanes to queued requests, the oldest first."""
        free = [lane for lane in self._lanes if lane.ticket is None]
        while free and self._queue:
            with self._changed:
                ticket = self._queue.popleft()
            lane = best_lane(free, ticket.request.tokens)
            free.remove(lane)
            self._taken += 1
            self._reused_tokens += lane.take(ticket, self._taken)
            self._prompt_tokens += len(ticket.request.tokens)
            self._settings_changed = True

    def _begin_chunk(self) -> tuple[Lane, int, jax.Array] | None:
        """Begins the next chunk of the oldest prompt that is not in the cache.

        Returns the packed log-probabilities of its tokens and their number, if they are asked for.
        """
        waiting = [lane for lane in self._lanes if lane.is_prefilling]
        for lane in sorted(waiting, key=lambda lane: lane.taken):
            self._share(lane)
            if lane.is_prefilling:
                return self._begin_chunk_of(lane)
        return None

    def _share(self, lane: Lane) -> None:
        """Copies what another lane has of a prompt, if it is more and worth a copy.

        So the choices of one request, and requests with one system prompt, run it once.
        """
        if lane.request.prompt_logprobs:
            return
        source, count = best_source(self._lanes, lane)
        if count - lane.cached < self._device.short_chunk:
            return
        self._device.copy(source.index, lane.index, count)
        self._reused_tokens += count - lane.cached
        lane.cached = count

    def _begin_chunk_of(self, lane: Lane) -> tuple[Lane, int, jax.Array] | None:
        place = lane.index, lane.cached
        if not lane.request.prompt_logprobs:
            lane.cached += self._device.prefill(*place, lane.rest[:-1])
            return None
        count, rows = self._device.score(*place, lane.rest)
        lane.cached += count
        return lane, count, rows

    def _begin_step(self) -> tuple[list[Lane], jax.Array | None]:
        """Begins a decode step. Returns its lanes, and their packed tokens if there are any."""
        masks = self._masks()
        decoding = [lane for lane in self._lanes if lane.is_decoding]
        if not decoding:
            return [], None
        if self._settings_changed:
            self._put_settings()
        zeros = np.zeros(len(self._lanes), np.int32)
        step = Step(
            token=zeros.copy(),
            position=zeros.copy(),
            entry=zeros + self._device.spare,
            index=zeros.copy(),
        )
        for lane in decoding:
            step.token[lane.index] = lane.tokens[-1]
            step.position[lane.index] = step.entry[lane.index] = lane.cached
            step.index[lane.index] = lane.drawn
        self._steps += 1
        return decoding, self._device.decode(step, masks)

    def _masks(self) -> np.ndarray | None:
        """Returns the vocabulary masks of this step; None if no lane has a constraint."""
        masks = None
        shape = len(self._lanes), words(self._vocab_size)
        for lane in self._lanes:
            if not lane.is_decoding or lane.request.constraint is None:
                continue
            masks = np.full(shape, EVERY_ID) if masks is None else masks
            try:
                masks[lane.index] = packed_mask(lane.request.constraint, shape[1])
            except Exception as error:
                self._end(lane, End("error", first_line(error)))
        return masks

    def _put_settings(self) -> None:
        self._device.set_settings(settings_of(self._lanes))
        self._settings_changed = False

    def _end_prompts(self) -> None:
        """Reports the prompts that are in the cache, where their log-probabilities are asked for.

        A request without a response ends here.
        """
        for lane in self._busy():
            if lane.is_prefilling or lane.is_reported:
                continue
            lane.is_reported = True
            if lane.request.prompt_logprobs:
                self._emit(lane, lane.prompt())
            if not lane.request.max_tokens:
                self._end(lane, End("length"))

    def _collect(self, decoding: list[Lane], drawn: Drawn) -> None:
        """Adds the tokens of a step to their lanes, and frees the lanes that have ended."""
        self._response_tokens += len(decoding)
        for lane in decoding:
            try:
                token, end = lane.draw(drawn)
                self._emit(lane, token)
            except Exception as error:
                end = End("error", first_line(error))
            if end is not None:
                self._end(lane, end)

    def _emit(self, lane: Lane, event: Event) -> None:
        assert lane.ticket is not None
        self._events.append((lane.ticket, event))

    def _end(self, lane: Lane, end: End) -> None:
        self._emit(lane, end)
        lane.free()
        self._settings_changed = True

    def _flush(self) -> None:
        """Passes events on. A request whose receiver fails is cancelled."""
        events, self._events = self._events, []
        for ticket, event in events:
            try:
                ticket.emit(event)
            except Exception as error:
                log.warning("a request's receiver failed: %s", first_line(error))
                ticket.is_cancelled = True

    def _fail(self, error: Exception) -> None:
        """Ends what runs, and goes on with an empty cache."""
        log.error("the engine failed: %s", first_line(error, kind=True), exc_info=error)
        for lane in self._busy():
            self._end(lane, End("error", first_line(error)))
        for lane in self._lanes:
            lane.tokens, lane.cached = [], 0
        self._device.reset()

    def _busy(self) -> list[Lane]:
        return [lane for lane in self._lanes if lane.ticket is not None]


def settings_of(lanes: Sequence[Lane]) -> Settings:
    """Returns how the lanes sample; free ones are greedy, which takes least."""
    greedy = Request(tokens=(), max_tokens=0, temperature=0.0)
    requests = [greedy if lane.ticket is None else lane.request for lane in lanes]

    def column(values: Iterable[float], dtype: Any) -> Any:
        return np.array(list(values), dtype)

    log_min_p = (math.log(r.min_p) if r.min_p else -math.inf for r in requests)
    return Settings(
        seed=column((r.seed % 2**32 for r in requests), np.uint32),
        temperature=column((r.temperature for r in requests), np.float32),
        top_k=column((r.top_k for r in requests), np.int32),
        top_p=column((r.top_p for r in requests), np.float32),
        log_min_p=column(log_min_p, np.float32),
        wants_top=column((r.logprobs > 0 for r in requests), bool),
    )
