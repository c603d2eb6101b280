"""An engine without a model: it emits what a function says, from separate threads."""

import threading
import time
from typing import NamedTuple

from rlhfjax.serve.requests import End, Full, Prompt, Token, validate_request


class FakeStats(NamedTuple):
    busy: int


class FakeEngine:
    """Emits the ids that `write` returns for a request, as `engine.Engine` does.

    Token j has logprob -(j + 1) / 4; its alternatives are the ids after it, each less likely by 1.
    """

    def __init__(
        self, write, *, length=256, vocab_size=10_000, most=64, seconds=0.0, crash=""
    ):
        self.write, self.length, self.vocab_size = write, length, vocab_size
        self.most, self.seconds, self.crash = most, seconds, crash
        self.requests = []
        self.busy = 0
        self.is_closed = False
        self._lock = threading.Lock()

    def submit(self, request, emit):
        validate_request(request, self.length, self.vocab_size)
        with self._lock:
            if self.busy >= self.most:
                raise Full
            self.busy += 1
            self.requests.append(request)
        return FakeTicket(self, request, emit)

    def stats(self):
        return FakeStats(self.busy)

    def close(self):
        self.is_closed = True


class FakeTicket:
    def __init__(self, engine, request, emit):
        self._engine, self._request, self._emit = engine, request, emit
        self._cancelled = threading.Event()
        threading.Thread(target=self._work, daemon=True).start()

    def cancel(self):
        self._cancelled.set()

    def _work(self):
        end = self._run()
        with self._engine._lock:
            self._engine.busy -= 1
        self._emit(end)

    def _run(self):
        request, engine = self._request, self._engine
        if request.prompt_logprobs:
            known = [self._token(j, id) for j, id in enumerate(request.tokens)]
            self._emit(
                Prompt((known[0]._replace(logprob=float("nan"), top=()), *known[1:]))
            )
        if engine.crash:
            return End("error", engine.crash)
        for j, id in enumerate(engine.write(request)):
            if j == request.max_tokens:
                return End("length")
            time.sleep(engine.seconds)
            if self._cancelled.is_set():
                return End("cancelled")
            self._emit(self._token(j, id))
            if id in request.stop_ids:
                return End("stop")
        return End("length")

    def _token(self, j, id):
        logprob = -(j + 1) / 4
        top = [(id + i, logprob - i) for i in range(self._request.logprobs)]
        return Token(id, logprob, tuple(top))
