"""Many requests through one model: `RastForCausalLM.generate_iter`, its requests, and threads that take turns."""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import threading
import time
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from rast import _core
from rast.inputs import Ids
from rast.outputs import Sample

if TYPE_CHECKING:
    from types import TracebackType

    from typing_extensions import Self

__all__ = ["EngineTurn", "GenerateIterator", "Request", "Turns"]

_SLICE = 0.1  # seconds that one turn steps, when no sample ends before


@dataclass
class Request:
    """One prompt for `generate_iter`, with options of its own over those of the call."""

    input_ids: Ids
    """`[length]` integers, one prompt."""
    tag: Any = None
    """Yours; comes back with the samples, and names the request in `cancel`."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """See `rast.generation.GenerateKwargs`."""
    copy: int | None = None
    """Index of the first sample among the copies of its prompt, on which its draws depend; None: as many as this
    iterator has had with the same prompt and seed, as in `generate`."""


class Turns:
    """A lock whose waiters come in order of arrival; a thread that has it may take it again."""

    def __init__(self) -> None:
        self._mutex = threading.Lock()
        self._queue: deque[tuple[threading.Lock, int]] = deque()
        self._owner: int | None = None
        self.depth = 0
        """How many times the thread that has it has taken it."""

    def acquire(self, wait: bool = True) -> bool:
        me = threading.get_ident()
        gate = threading.Lock()
        with self._mutex:
            if self._owner in (None, me):
                self._owner = me
                self.depth += 1
                return True
            if not wait:
                return False
            gate.acquire()
            entry = (gate, me)
            self._queue.append(entry)
        try:
            gate.acquire()  # opened by release(), which makes us the owner
        except BaseException:
            with self._mutex:
                waiting = entry in self._queue
                if waiting:
                    self._queue.remove(entry)
            if not waiting:
                self.release()
            raise
        return True

    def release(self) -> None:
        with self._mutex:
            self.depth -= 1
            if self.depth:
                return
            self._owner = None
            if self._queue:
                gate, self._owner = self._queue.popleft()
                self.depth = 1
                gate.release()

    def __enter__(self) -> Self:
        self.acquire()
        return self

    def __exit__(self, *_: object) -> None:
        self.release()


class _Model(Protocol):
    """What an iterator needs of a model."""

    @property
    def _turns(self) -> Turns: ...
    @property
    def _abandoned(self) -> list[int]: ...
    @property
    def _sessions(self) -> Iterator[int]: ...
    def _take_turn(self, wait: bool = True) -> _core.Engine | None: ...
    def _read_request(
        self, request: Request, config: Any, options: Mapping[str, Any]
    ) -> tuple[_core.Request, int | None]: ...


@dataclass
class _Running:
    """A request of which samples are still to come."""

    request: Request
    id: int
    seed: int
    n_left: int


class GenerateIterator(Iterator[Sample]):
    """Samples as they end. Made by `RastForCausalLM.generate_iter`.

    Leaving it (`close()`, a `with` block, or no reference any more) ends what still runs. It belongs to one thread at a
    time, except that `cancel` may be called from anywhere.
    """

    def __init__(self, model: _Model, source: Iterable[Any], config: Any, options: Mapping[str, Any]) -> None:
        self._model = model
        self._source: Iterator[Any] | None = iter(source)
        self._config = config
        self._options = options
        self._session = next(model._sessions)
        self._tags = itertools.count()
        self._running: dict[int, _Running] = {}
        self._n_left = 0  # samples
        self._at_once = 0  # most that the model runs; 0: not asked yet
        self._copies: Counter[bytes] = Counter()
        self._ready: deque[Sample] = deque()
        self._to_cancel: deque[Any] = deque()
        self._error: Exception | None = None  # the source's, raised when everything else is out
        self._busy = threading.Lock()

    # ---- for users ---------------------------------------------------------------------------------------------

    def __next__(self) -> Sample:
        if not self._busy.acquire(blocking=False):
            raise RuntimeError("this iterator is being read already, by another thread or by its own source")
        try:
            while not self._ready:
                self._cancel_asked()
                self._pull()
                if self._ready:
                    break
                if not self._running:
                    if self._error is not None:
                        error, self._error = self._error, None
                        raise error
                    raise StopIteration
                self._collect()
            return self._ready.popleft()
        except StopIteration:
            raise
        except BaseException:
            self._stop()
            raise
        finally:
            self._busy.release()

    def cancel(self, tag: Any) -> None:
        """Ends all requests with this tag that run; their samples come with finish_reason "cancelled"."""
        self._to_cancel.append(tag)

    def close(self) -> None:
        """Ends everything; what was ready and not read is lost."""
        if not self._busy.acquire(blocking=False):
            raise RuntimeError("this iterator is being read already, by another thread or by its own source")
        try:
            self._stop()
            self._ready.clear()
            self._error = None
        finally:
            self._busy.release()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __del__(self) -> None:
        # It may run anywhere, between two bytecodes of a thread that has its turn: the next turn does the work.
        if getattr(self, "_running", None):
            self._model._abandoned.append(self._session)

    # ---- the loop ----------------------------------------------------------------------------------------------

    def _pull(self) -> None:
        """Takes requests from the source while the model could run more at once; a slow source must not hold up those
        that run."""
        begin = time.monotonic()
        while self._source is not None:
            if not self._at_once:
                with EngineTurn(self._model) as engine:
                    self._at_once = engine.info()["max_seqs"]
            if max(self._n_left, len(self._ready)) >= self._at_once:
                return
            if self._running and time.monotonic() - begin > _SLICE:
                return
            try:
                item = next(self._source)
            except StopIteration:
                self._source = None
                return
            except Exception as error:
                self._stop(wait=True)
                self._error = error
                return
            self._submit(item)

    def _submit(self, item: Any) -> None:
        request, error = item, None
        try:
            request = _as_request(item)
            made, seed = self._model._read_request(request, self._config, self._options)
        except Exception as problem:
            error = problem
        if error is None:
            made["tag"] = next(self._tags)
            if request.copy is not None:
                made["first_copy"] = request.copy
            elif seed is not None:  # somebody chose the seed: equal requests must differ
                key = hashlib.blake2b(made["ids"].tobytes() + seed.to_bytes(8, "little"), digest_size=16).digest()
                made["first_copy"] = self._copies[key]
            with EngineTurn(self._model) as engine:
                try:
                    request_id = engine.submit(made, self._session)
                except Exception as problem:
                    error = problem
        if error is not None:
            tag = request.tag if isinstance(request, Request) else None
            if isinstance(item, Mapping):
                tag = item.get("tag")
            self._ready.append(Sample(tag=tag, error=_without_frames(error)))
            return
        n_samples = made["n_samples"]
        if request.copy is None and seed is not None:
            self._copies[key] += n_samples
        self._running[made["tag"]] = _Running(request, request_id, made["seed"], n_samples)
        self._n_left += n_samples

    def _cancel_asked(self) -> None:
        while self._to_cancel:
            tag = self._to_cancel.popleft()
            for running in self._running.values():
                if _equal(running.request.tag, tag):
                    with (
                        EngineTurn(self._model) as engine,
                        contextlib.suppress(ValueError),
                    ):  # all its samples have ended
                        engine.cancel(running.id)

    def _collect(self, seconds: float = _SLICE) -> None:
        with EngineTurn(self._model) as engine:
            self._receive(engine.collect(self._session, seconds))

    def _receive(self, results: list[_core.Result]) -> None:
        for result in results:
            running = self._running[result["tag"]]
            running.n_left -= 1
            self._n_left -= 1
            if not running.n_left:
                del self._running[result["tag"]]
            self._ready.append(_sample(result, running))

    def _stop(self, wait: bool = False) -> None:
        """Keeps what has ended for the next reads and ends the rest.

        If the model's turn is not free and this may not wait for it, then later, and what has not been read is lost.
        """
        self._source = None
        if not self._running:
            return
        engine = self._model._take_turn(wait=wait)
        if engine is None or self._model._turns.depth > 1:
            self._model._abandoned.append(self._session)
        else:
            self._receive(engine.collect(self._session, 0))
            engine.abandon(self._session)
        if engine is not None:
            self._model._turns.release()
        self._running.clear()
        self._n_left = 0


class EngineTurn:
    """`with EngineTurn(model) as engine`: the model's engine for this thread alone."""

    def __init__(self, model: _Model) -> None:
        self._model = model

    def __enter__(self) -> _core.Engine:
        engine = self._model._take_turn()
        assert engine is not None  # it waited
        if self._model._turns.depth > 1:
            self._model._turns.release()
            raise RuntimeError("the model is in use by a call that this one was made from")
        return engine

    def __exit__(self, *_: object) -> None:
        self._model._turns.release()


def _as_request(item: Any) -> Request:
    """A `Request`, or a dict with its fields and options."""
    if isinstance(item, Request):
        return item
    if not isinstance(item, Mapping):
        raise TypeError(f"a request must be a rast.Request or a dict with input_ids, not {type(item).__name__}")
    options = dict(item)
    if "input_ids" not in options:
        raise TypeError("a request needs input_ids")
    request = Request(options.pop("input_ids"), options.pop("tag", None), copy=options.pop("copy", None))
    request.options = options
    return request


def _equal(a: Any, b: Any) -> bool:
    """Of tags; whatever cannot be compared is not equal."""
    if a is b:
        return True
    if isinstance(a, np.ndarray) or isinstance(b, np.ndarray):
        return type(a) is type(b) and np.array_equal(a, b)
    try:
        return bool(a == b)
    except Exception:
        return False


def _without_frames(error: Exception) -> Exception:
    """The error without its tracebacks, which would keep the iterator alive as long as somebody keeps the error."""
    link: BaseException | None = error
    while link is not None:
        link.__traceback__ = None
        link = link.__cause__ or link.__context__
    return error


def _sample(result: _core.Result, running: _Running) -> Sample:
    return Sample(
        tag=running.request.tag,
        index=result["sample"],
        new_tokens=result["tokens"].astype(np.int64),
        finish_reason=result["finish"],
        seed=running.seed,
        error=result["error"],
        logprob=result["logprob"],
        base_logprob=result["base_logprob"],
        base_token=None if result["base_token"] is None else result["base_token"].astype(np.int64),
        transfer_kl=result["kl"],
        scores=result["scores"],
        logits=result["logits"],
    )
