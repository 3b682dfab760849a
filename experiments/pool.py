"""Several runs of a study at a time, each in processes of its own; on CUDA they are dealt out to the devices in turn."""

import os
import queue
import signal
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import contextmanager
from typing import Any, TypeVar

import torch

from xattn.experiments.launch import stop_all, stopped
from xattn.experiments.schema import TrainerConfig

T = TypeVar("T")
_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2)


def in_turn(work: Callable[[T, dict[str, str]], Any], jobs: Sequence[T], *, trainer: TrainerConfig, at_once: int) -> list[Any]:
    """`work(job, environment)` of every job, `at_once` of them at a time. Returns their results in order.

    A job is started while nothing asks this process to stop; None stands for one that was not started.

    Args:
        work: starts processes with that environment on top of this one's, and waits for them.
    """
    places: queue.SimpleQueue[dict[str, str]] = queue.SimpleQueue()
    for place in environments(trainer, at_once):
        places.put(place)

    def one(job: T) -> Any:
        if stopped():
            return None
        place = places.get()
        try:
            return work(job, place)
        finally:
            places.put(place)

    if at_once == 1:
        return [one(job) for job in jobs]
    with _stops_forwarded(), ThreadPoolExecutor(at_once) as threads:
        futures = [threads.submit(one, job) for job in jobs]
        wait(futures)
    return [future.result() for future in futures]


def environments(trainer: TrainerConfig, at_once: int) -> list[dict[str, str]]:
    """What each of `at_once` places adds to the environment: one CUDA device, where runs are on CUDA and side by side."""
    if at_once == 1 or trainer.device == "cpu" or not torch.cuda.is_available():
        return [{}] * at_once
    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    devices = given.split(",") if given else [str(number) for number in range(torch.cuda.device_count())]
    return [{"CUDA_VISIBLE_DEVICES": devices[place % len(devices)]} for place in range(at_once)]


@contextmanager
def _stops_forwarded() -> Iterator[None]:
    """A stop request to this process reaches all that run; threads cannot take signals."""
    old = {number: signal.signal(number, lambda number, _: stop_all(number)) for number in _SIGNALS}
    try:
        yield
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)
