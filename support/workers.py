"""To be skipped at a first reading. Other processes that play while this one learns."""

import contextlib
import multiprocessing
import os
import pickle
import signal
import threading
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection

import numpy as np
import sac
import torch


def default_workers(envs: int, eval_episodes: int) -> int:
    """The most, up to 8, that leave torch a thread to learn with and can share the environments
    evenly. torch has as many threads as it counts cores, or OMP_NUM_THREADS. 0 if that is one.
    """
    most = min(torch.get_num_threads() - 1, eval_episodes, 8)
    return max((count for count in range(1, most + 1) if envs % count == 0), default=0)


class Workers:
    """Takes the place of a sac.Player; each of several processes plays a part of the environments.

    They play what a Player would, but for rounding: a CLIP that labels fewer frames at once may
    differ in the last bits, from which learning makes another run, as good or bad.

    make_envs: has a parameter `count` and makes a vector environment. label_here: frames come back
    and are labelled by this process, all of a round in one call; for a large CLIP, which is to be
    in memory once. Else each process labels its own. Raises ValueError unless the environments can
    be shared evenly, and if make_envs or reward_fn cannot be sent to another process.
    """

    def __init__(
        self,
        make_envs: Callable,
        count: int,
        reward_fn: Callable | None,
        config: sac.Config,
        workers: int,
        label_here: bool = False,
    ):
        if count % workers or config.eval_episodes < workers:
            given = f"{workers} workers for {count} environments"
            given += f" and evaluations of {config.eval_episodes} episodes"
            raise ValueError(f"{given}: they need equal shares of the first, and one of the second")
        self.num_envs, self.jobs, self.busy = count, [], False
        self.reward_fn = reward_fn if label_here else None
        keeps = label_here and reward_fn is not None
        settings = make_envs, count // workers, None if keeps else reward_fn, keeps, config
        try:
            settings = pickle.dumps(settings)
        except (pickle.PicklingError, AttributeError, TypeError) as error:
            raise ValueError(f"this cannot be sent to workers ({error}): use none") from error
        context, self.workers = multiprocessing.get_context("spawn"), []  # a fork could not draw
        with interrupts_ignored():  # which a new process inherits: this one ends the others
            for first in range(0, count, count // workers):
                pipe, its_end = context.Pipe()
                process = context.Process(target=work, args=(its_end, settings), daemon=True)
                process.start()
                its_end.close()  # so that here is an EOFError if it dies
                self.workers.append((first, pipe, process))

    def begin(self, weights: dict, start: int):
        self.jobs.append(({name: value.cpu() for name, value in weights.items()}, start))
        if not self.busy:
            self.send()

    def send(self):
        """The next job. Only where no result is on its way: both ends would wait for each other."""
        weights, start = self.jobs.pop(0)
        with death_as_error():
            for first, pipe, _ in self.workers:
                # as bytes: torch would use shared memory, of which containers have little
                pipe.send_bytes(pickle.dumps((weights, start, first, self.num_envs)))
        self.busy = True

    def forget(self):
        self.jobs.clear()
        if self.busy:
            self.finish()

    def finish(self) -> tuple:
        with death_as_error():
            results = [pipe.recv() for _, pipe, _ in self.workers]
        self.busy = False
        for result in results:
            if isinstance(result, Exception):
                raise result
        if self.jobs:
            self.send()
        return tuple(self.together(parts) for parts in zip(*results))

    def together(self, parts: list[tuple]) -> sac.Transitions | None:
        """parts: of each worker, what it played or None, and its frames or None."""
        if parts[0][0] is None:
            return None
        played = sac.side_by_side([part for part, _ in parts])
        if self.reward_fn is None:
            return played
        frames = np.concatenate([frames for _, frames in parts], 1)  # (T, N, H, W, 3)
        rewards = sac.label(self.reward_fn, frames.reshape(-1, *frames.shape[2:]))
        return played._replace(reward=rewards.reshape(played.reward.shape))

    def close(self):
        """Leaves no process behind, without waiting for what they play."""
        for _, pipe, process in self.workers:
            process.terminate()
            process.join()
            pipe.close()


@contextlib.contextmanager
def interrupts_ignored() -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():
        yield  # no other thread may change it, nor is interrupted
        return
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


@contextlib.contextmanager
def death_as_error() -> Iterator[None]:
    try:
        yield
    except (EOFError, ConnectionError) as error:
        why = "its error stands above, if it had one; else memory may have run out"
        raise ValueError(f"a worker died: {why}. Without workers: --workers 0") from error


class Keeper:
    """A reward function that keeps the frames, for the process that can label them."""

    def __init__(self):
        self.kept = []

    def __call__(self, frames: np.ndarray) -> np.ndarray:
        self.kept.append(frames)
        return np.zeros(len(frames))

    def frames_of(self, played: sac.Transitions | None) -> np.ndarray | None:
        """Those of the calls by which it was played, (T, N, H, W, 3)."""
        if played is None:
            return None
        (steps, count), parts, found = played.reward.shape, [], 0
        while found < count:
            frames = self.kept.pop(0)
            parts.append(frames.reshape(steps, -1, *frames.shape[1:]))
            found += parts[-1].shape[1]
        return np.concatenate(parts, 1)[:, :count]


def work(pipe: Connection, settings: bytes):
    """In another process, until this one is gone."""
    torch.set_num_threads(1)
    os.environ.setdefault("LP_NUM_THREADS", "0")  # of Mesa, if it draws in software
    make_envs, count, reward_fn, keeps, config = pickle.loads(settings)
    keeper = Keeper() if keeps else None
    player = sac.Player(make_envs(count=count), keeper or reward_fn, config)
    with contextlib.suppress(EOFError, ConnectionError):
        while True:
            job = pickle.loads(pipe.recv_bytes())
            try:
                results = player.play(*job)
                pipe.send([(x, keeper.frames_of(x) if keeper else None) for x in results])
            except ValueError as error:  # such as rewards that are NaN
                pipe.send(error)
