"""Who runs the trials: several processes of one thread each, which are handed groups of them."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path

from ggl_audit.basics.clock import Clock
from ggl_audit.errors import AuditError, CannotGoOnError
from ggl_audit.experiments.experiment import Experiment, Group, Result, Wanted
from ggl_audit.experiments.schedule import Outcomes, run_group
from ggl_audit.messages import Message
from ggl_audit.spec import Spec

MakeExperiments = Callable[[Spec], Mapping[str, Experiment[Result]]]

LOOKS = 1.0
"""Seconds between looks at the clock, while nothing is done."""

WORKER_DIED = Message(
    "ledger/worker-died",
    "a worker has died twice in {trials} ({cause})",
    "It may lack memory: take fewer --workers, or lower memory. What other trials gave is in the "
    "--ledger, if one was named.",
    advice="Exit code 3. It may lack memory: take fewer `--workers`, or lower `memory`.",
)


@dataclass
class _Worker:
    """A process, the way to it, and what it is at."""

    process: BaseProcess
    connection: Connection
    group: Group | None = None


class Workers:
    """Processes that load the case by themselves, and run what they are handed.

    They are spawned and not forked, so that each can have a GPU. Where one dies, the trials that it
    was at are run again, once.

    Args:
        make: from a spec to the experiments by name; a function of a module.
        spec: what was declared.
        count: of processes.
        advance: told of the candidates that were evaluated.
        say: told in a sentence of what happens to the workers.
        clock: ends all when the time is up.
    """

    def __init__(
        self,
        make: MakeExperiments,
        spec: Spec,
        count: int,
        advance: Callable[[int], None],
        say: Callable[[str], None],
        clock: Clock,
    ) -> None:
        self._make = make
        self._spec = spec
        self._advance = advance
        self._say = say
        self._clock = clock
        self._died: set[Group] = set()
        self._workers = [self._start() for _ in range(count)]

    def __enter__(self) -> Workers:
        return self

    def __exit__(self, *_: object) -> None:
        for worker in self._workers:
            worker.connection.close()
            worker.process.kill()
            worker.process.join()

    def run(self, groups: Sequence[Group], wanted: Wanted) -> Iterator[tuple[Group, Outcomes]]:
        """Hands groups out in their order, and yields each as it is done."""
        left = list(groups)
        while True:
            for worker in self._workers:
                while worker.group is None and left:
                    group = left.pop(0)
                    if group in self._died or wanted(group):
                        self._hand(worker, group)
            busy = [worker for worker in self._workers if worker.group is not None]
            if not busy:
                return
            ready = wait([worker.connection for worker in busy], timeout=LOOKS)
            self._clock.check()
            for worker in busy:
                if worker.connection not in ready or worker.group is None:
                    continue
                group, worker.group = worker.group, None
                try:
                    found = worker.connection.recv()
                except (EOFError, OSError):
                    self._replace(worker, group)
                    left.insert(0, group)
                    continue
                if isinstance(found, BaseException):
                    raise found
                self._advance(sum(outcome.evaluations for outcome in found))
                yield group, found

    def _start(self) -> _Worker:
        context = multiprocessing.get_context("spawn")
        ours, theirs = context.Pipe()
        declared = self._spec.model_dump_json(exclude_unset=True), self._spec.folder
        process = context.Process(target=_work, args=(theirs, self._make, *declared), daemon=True)
        with _for_workers():
            process.start()
        theirs.close()
        return _Worker(process, ours)

    def _hand(self, worker: _Worker, group: Group) -> None:
        worker.group = group
        with suppress(OSError):  # it has died, which is seen when its answer is read
            worker.connection.send(group)

    def _replace(self, worker: _Worker, group: Group) -> None:
        """Starts another process in the place of one that died.

        Raises:
            CannotGoOnError: one had died in the same trials before.
        """
        worker.process.join()
        first, last = group.trials.start, group.trials.stop - 1
        trials = f"trials {first} to {last} of {group.experiment}"
        cause = f"exit code {worker.process.exitcode}"
        if group in self._died:
            raise CannotGoOnError(WORKER_DIED(trials=trials, cause=cause))
        self._died.add(group)
        self._say(f"a worker died in {trials} ({cause}); they are run again")
        worker.connection.close()
        other = self._start()
        worker.process, worker.connection = other.process, other.connection


@contextmanager
def _for_workers() -> Iterator[None]:
    """Has the processes that are started meanwhile use one thread each, and leave Ctrl-C to us."""
    before = os.environ.get("OMP_NUM_THREADS")
    os.environ["OMP_NUM_THREADS"] = "1"
    is_main = threading.current_thread() is threading.main_thread()
    handler = signal.signal(signal.SIGINT, signal.SIG_IGN) if is_main else None
    try:
        yield
    finally:
        if is_main:
            signal.signal(signal.SIGINT, handler)
        if before is None:
            del os.environ["OMP_NUM_THREADS"]
        else:
            os.environ["OMP_NUM_THREADS"] = before


def _work(connection: Connection, make: MakeExperiments, spec: str, folder: Path) -> None:
    """Loads the case, and runs the groups that come in, until there is nobody to hand any."""
    import torch

    # Ctrl-C is for the process that grades what there is.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(1)
    clock = Clock()
    fault: AuditError | None = None
    experiments: Mapping[str, Experiment[Result]] = {}
    try:
        experiments = make(Spec.model_validate_json(spec).placed(folder, lambda _: ""))
    except AuditError as error:
        fault = error
    with suppress(EOFError, OSError):  # nobody is left to work for
        while True:
            group = connection.recv()
            if fault is None:
                try:
                    experiment = experiments[group.experiment]
                    found = run_group(experiment, group, lambda _: None, clock)
                except AuditError as error:
                    fault = error
            connection.send(fault or found)
