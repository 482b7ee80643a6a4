"""Many requests through one model: `RastForCausalLM.generate_iter`, its requests, and how their source is read."""

from __future__ import annotations

import _thread
import contextlib
import contextvars
import hashlib
import itertools
import operator
import os
import time
import weakref
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from queue import Empty, SimpleQueue
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from rast import _core
from rast.inputs import Ids
from rast.outputs import Sample

if TYPE_CHECKING:
    from types import TracebackType

    from typing_extensions import Self

__all__ = ["GenerateIterator", "Request"]

_SLICE = 0.1  # seconds that one turn steps, when no sample ends before
_SHORT_SLICE = 0.02  # the same while an item of the source is awaited
_PATIENCE = 0.002  # seconds that everything waits for an item, once


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


class _Model(Protocol):
    """What an iterator needs of a model."""

    def _check_process(self) -> None: ...
    def _shared_engine(self) -> _core.Engine: ...
    def _read_request(
        self, request: Request, config: Any, options: Mapping[str, Any]
    ) -> tuple[_core.Request, int | None]: ...


class _End:
    """Stands for the item after the last."""


class _Source:
    """The items of an iterable, which a thread reads one by one as they are asked for.

    The thread is the same from the first item to the last, and ends with this object. It is not the caller's, because a
    source may block until something comes in, or until it sees results that the caller has not got yet. Lists and other
    sequences do not block, and need no thread.
    """

    # `_thread` and SimpleQueue, not `threading`: whose own locks a signal's exception may leave in any state.

    def __init__(self, source: Iterable[Any]) -> None:
        self._items = [iter(source)]
        self._direct = isinstance(source, Sequence)
        self._asked: SimpleQueue[Any] = SimpleQueue()
        self._answers: SimpleQueue[tuple[Any, BaseException | None]] = SimpleQueue()
        self._thread = 0
        self._process = os.getpid()
        self.late = False
        """An item has been asked for and has not come."""

    def get(self, patience: float | None) -> Any:
        """The next item, or _End; what the source raises. Empty: not within `patience` seconds, for which an item is
        waited for once; None: for ever."""
        if self._direct:
            return next(self._items[0], _End)
        if not self._thread:
            # Whichever way this object dies, the thread gets the reference to it instead of True, and ends.
            ended = weakref.ref(self, self._asked.put)
            work = (_read_source, self._items, self._asked, self._answers, ended)
            self._thread = _thread.start_new_thread(contextvars.copy_context().run, work)
        if self.late:
            patience = None if patience is None else 0
        else:
            self._asked.put(True)
            self.late = True
        item, error = self._answers.get(timeout=patience)
        self.late = False
        if error is not None:
            raise error
        return item

    def is_reading(self) -> bool:
        """Whether the source itself calls this."""
        return self._thread == _thread.get_ident()

    def close(self) -> None:
        """Waits until the source is closed, unless it is at work: then it is closed when it has its next item."""
        self._asked.put(False)
        if self._thread and not self.late and self._process == os.getpid():  # a child of fork() has no such thread
            self._answers.get()


def _read_source(holder: list[Iterator[Any]], asked: SimpleQueue[Any], answers: SimpleQueue[Any], _: object) -> None:
    """One answer for each True, and one at the end, when nobody has the items any more."""
    items: Iterator[Any] | None = holder.pop()
    while asked.get() is True:
        try:
            answers.put((next(items, _End), None))  # type: ignore[arg-type]
        except BaseException as error:
            answers.put((None, error))
    items = None
    answers.put((_End, None))


@dataclass
class _Running:
    """A request of which samples are still to come."""

    request: Request
    seed: int
    n_left: int
    id: int = -1


class GenerateIterator(Iterator[Sample]):
    """Samples as they end. Made by `RastForCausalLM.generate_iter`.

    Leaving it (`close()`, a `with` block, or no reference any more) ends what still runs. It belongs to one thread at a
    time, except that `cancel` may be called from anywhere.
    """

    # A signal's exception can come between any two steps of Python code. So what must not be lost or left behind is in
    # the hands of C code: requests end with their session, and samples that have ended are in the session or in _ready.

    def __init__(self, model: _Model, source: Iterable[Any], config: Any, options: Mapping[str, Any]) -> None:
        self._model = model
        self._source: _Source | None = _Source(source)
        self._config = config
        self._options = options
        self._engine = model._shared_engine()
        self._session = _core.Session(self._engine)
        self._tags = itertools.count()
        self._running: dict[int, _Running] = {}
        self._n_left = 0  # samples
        self._at_once = 0  # most that the model runs; 0: not asked yet
        self._copies: Counter[bytes] = Counter()
        self._ready: deque[Sample | _core.Result] = deque()
        self._to_cancel: deque[Any] = deque()
        self._error: Exception | None = None  # the source's, raised when everything else is out

    # ---- for users ---------------------------------------------------------------------------------------------

    def __next__(self) -> Sample:
        self._model._check_process()
        if self._source is not None and self._source.is_reading():
            raise RuntimeError("this iterator is being read already, by its own source")
        with self._session:
            try:
                self._advance()
            except BaseException:
                self._stop()
                raise
            if not self._ready:
                if self._error is not None:
                    error, self._error = self._error, None
                    raise error
                raise StopIteration
            result = self._ready[0]
            if isinstance(result, Sample):
                sample = result
            else:
                tag = result["tag"]
                running = self._running[tag]
                sample = _sample(result, running)
                running.n_left -= 1  # from here to the end nothing is called, so no signal comes in between
                if not running.n_left:
                    del self._running[tag]
            del self._ready[0]
            return sample

    def cancel(self, tag: Any) -> None:
        """Ends all requests with this tag that run; their samples come with finish_reason "cancelled"."""
        self._to_cancel.append(tag)

    def close(self) -> None:
        """Ends everything; what was ready and not read is lost."""
        with self._session:
            self._stop(forget=True)
            self._ready.clear()
            self._running.clear()
            self._n_left = 0
            self._error = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # ---- the loop ----------------------------------------------------------------------------------------------

    def _advance(self) -> None:
        """Until a sample is ready or all is over."""
        while not self._ready:
            self._cancel_asked()
            self._pull()
            if self._ready:
                return
            if self._n_left:
                late = self._source is not None and self._source.late
                self._n_left = self._session.collect(_SHORT_SLICE if late else _SLICE, self._ready.append)
            elif self._source is None:
                return

    def _pull(self) -> None:
        """Takes requests from the source while the model could run more at once."""
        begin = time.monotonic()
        while self._source is not None:
            if not self._at_once:
                self._at_once = self._engine.info()["max_seqs"]
            if max(self._n_left, len(self._ready)) >= self._at_once:
                return
            if self._n_left and time.monotonic() - begin > _SLICE:
                return
            try:
                item = self._source.get(_PATIENCE if self._n_left or self._ready else None)
            except Empty:
                return
            except Exception as error:
                self._stop()
                self._error = error
                return
            if item is _End:
                self._source.close()
                self._source = None
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
            number = made["tag"] = next(self._tags)
            if request.copy is not None:
                made["first_copy"] = operator.index(request.copy)
            elif seed is not None:  # somebody chose the seed: equal requests must differ
                key = hashlib.blake2b(made["ids"].tobytes() + seed.to_bytes(8, "little"), digest_size=16).digest()
                made["first_copy"] = self._copies[key]
            n_samples = made["n_samples"]
            running = self._running[number] = _Running(request, made["seed"], n_samples)
            try:
                running.id = self._session.submit(made)
            except RuntimeError:  # not about the request
                del self._running[number]
                raise
            except Exception as problem:
                del self._running[number]
                error = problem
        if error is not None:
            tag = request.tag if isinstance(request, Request) else None
            if isinstance(item, Mapping):
                tag = item.get("tag")
            self._ready.append(Sample(tag=tag, error=_without_frames(error)))
            return
        if request.copy is None and seed is not None:
            self._copies[key] += n_samples
        self._n_left += n_samples

    def _cancel_asked(self) -> None:
        while self._to_cancel:
            tag = self._to_cancel.popleft()
            for running in self._running.values():
                if _equal(running.request.tag, tag):
                    with contextlib.suppress(ValueError):  # all its samples have ended
                        self._session.cancel(running.id)

    def _stop(self, forget: bool = False) -> None:
        """Ends what runs. What has ended is kept for the next reads, unless `forget`."""
        self._session.stop(forget=forget)
        source, self._source = self._source, None
        if source is not None:
            source.close()


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
        steps=result["steps"],
        drafted=result["drafted"],
        accepted=result["accepted"],
    )
