"""Which requests a step holds, and a stream of random numbers for each.

What vLLM hands to a metadata builder says nothing of requests: neither block ids nor the place in the batch survive a
replay. Its model runners know them, so two methods of the runner are wrapped, once a builder of this backend exists,
and note what they see on the way (compat.py has their names).
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np


class RequestStreams:
    """Row seeds of requests that have arrived and not finished.

    A request's row seed is a hash of its prompt, of the seed of its sampling parameters, and of how many unfinished
    requests had both the same when it arrived. So a request that is sent again draws the same numbers, whatever else
    is in the batch, and equal requests at the same time draw different ones.
    """

    def __init__(self) -> None:
        self._requests: dict[str, tuple[bytes, int, int]] = {}  # content, number among equals, row seed
        self._taken: dict[bytes, set[int]] = {}  # numbers of the unfinished requests of one content

    def add(self, request_id: str, prompt: Sequence[int], seed: int | None) -> None:
        """A request that arrives, or comes back after preemption, when it keeps the row seed that it has."""
        digest = hashlib.blake2b(np.asarray(prompt, dtype=np.int64).tobytes(), digest_size=16)
        digest.update(repr(seed).encode())
        content = digest.digest()
        if request_id in self._requests:
            if self._requests[request_id][0] == content:
                return
            self.remove(request_id)
        taken = self._taken.setdefault(content, set())
        number = next(i for i in range(len(taken) + 1) if i not in taken)
        taken.add(number)
        self._requests[request_id] = content, number, _hash64(content, number)

    def remove(self, request_id: str) -> None:
        """A request that has finished; one that never arrived is no error."""
        if request_id not in self._requests:
            return
        content, number, _ = self._requests.pop(request_id)
        self._taken[content].remove(number)
        if not self._taken[content]:
            del self._taken[content]

    def row_seeds(self, request_ids: Iterable[str]) -> tuple[int, ...]:
        """Row seeds in the order of the ids; 0 for an id that never arrived, as those of warm-up steps."""
        return tuple(self._requests[i][2] if i in self._requests else 0 for i in request_ids)

    def note(self, scheduler_output: Any) -> None:
        """What vLLM's scheduler says of a step: requests that have finished, and that arrive."""
        for request_id in scheduler_output.finished_req_ids:
            self.remove(request_id)
        for request in scheduler_output.scheduled_new_reqs:
            prompt = request.prompt_token_ids
            parameters = request.sampling_params
            # A prompt of embeddings has no ids: such requests are equal, and told apart by their number.
            self.add(request.req_id, () if prompt is None else prompt, getattr(parameters, "seed", None))


def _hash64(content: bytes, number: int) -> int:
    digest = hashlib.blake2b(content + number.to_bytes(8, "little"), digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True)


class StepRows:
    """Row seeds of the step that a model runner of this process prepares: written by it, read by builders."""

    row_seeds: tuple[int, ...] = ()


def watch_runner(runner: type, note: str, rows: str, request_ids: Callable[[Any, Any], Sequence[str]]) -> None:
    """Wrap two methods of a model runner class, so that `StepRows.row_seeds` follows its steps.

    Args:
        runner: the class.
        note: the method that each step calls first, whose first argument is the scheduler's output.
        rows: the method after which the step's rows are known; may be the same.
        request_ids: from the runner and what `rows` returned, the requests in the order of the batch.

    Raises:
        RuntimeError: the class has no such method: a version of vLLM that this integration does not know.
    """
    if "_santa_watched" in vars(runner):
        return
    for name in (note, rows):
        if not callable(getattr(runner, name, None)):
            raise RuntimeError(
                f"santa: {runner.__module__}.{runner.__qualname__} has no method {name}; row seeds need it, and the "
                "vLLM versions that docs/vllm.md names have it"
            )

    def streams_of(self: Any) -> RequestStreams:
        return vars(self).setdefault("_santa_streams", RequestStreams())

    def wrap(name: str, before: bool, after: bool) -> None:
        method = getattr(runner, name)

        @functools.wraps(method)
        def wrapper(self: Any, scheduler_output: Any, *args: Any, **kwargs: Any) -> Any:
            streams = streams_of(self)
            if before:
                streams.note(scheduler_output)
            result = method(self, scheduler_output, *args, **kwargs)
            if after:
                StepRows.row_seeds = streams.row_seeds(request_ids(self, result))
            return result

        setattr(runner, name, wrapper)

    if note == rows:
        wrap(note, before=True, after=True)
    else:
        wrap(note, before=True, after=False)
        wrap(rows, before=False, after=True)
    runner._santa_watched = True
