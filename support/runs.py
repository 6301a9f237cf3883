"""To be skipped at a first reading. The folders of runs: files never half written, checkpoints."""

import contextlib
import csv
import io
import json
import math
import os
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import sac
import torch
from gymnasium.spaces import Box
from safetensors import safe_open
from safetensors.torch import save


@contextlib.contextmanager
def atomic_open(path: Path, mode: str = "wb") -> Iterator[io.BytesIO | io.StringIO]:
    """A file to write. It takes its name only when it is complete and on the disk.

    It is gathered in memory first: on a full disk, torch.save raises something else than OSError.
    """
    buffer = io.BytesIO() if "b" in mode else io.StringIO(newline="")
    yield buffer
    with open(f"{path}.part", "wb") as file:
        file.write(buffer.getvalue() if "b" in mode else buffer.getvalue().encode())
        file.flush()
        os.fsync(file.fileno())
    os.replace(f"{path}.part", path)


def write_json(path: Path, value: dict):
    with atomic_open(path, "w") as file:
        file.write(json.dumps(value, indent=1) + "\n")


def write_csv(path: Path, columns: Iterable[str], rows: list[dict]):
    with atomic_open(path, "w") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        for row in rows:
            writer.writerow({k: v if isinstance(v, str) else f"{v:.8g}" for k, v in row.items()})


def save_policy(path: Path, weights: dict):
    """weights: the state_dict of an agent."""
    with atomic_open(path) as file:
        torch.save(weights, file)


POLICIES = Path(__file__).parent.parent / "assets/policies"  # of some runs, kept with the code


def save_small_policy(path: Path, weights: dict, settings: dict):
    """What acts alone, in half precision: 0.3 MB in place of 8. settings: of its run."""
    actor = {key: x.half() for key, x in weights.items() if key.startswith("mean_actor")}
    norm = {key: x for key, x in weights.items() if key.startswith("norm")}  # too large for half
    kept = {key: x.contiguous() for key, x in (actor | norm).items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_open(path) as file:
        file.write(save(kept, {"settings": json.dumps(settings)}))


def load_policy(run: Path) -> tuple[sac.SAC, dict]:
    """The agent of a run's folder, or of a policy in assets/policies by its name, and its settings.

    Only for deterministic_action: a kept policy has no critics. Raises ValueError if there is none.
    """
    small = POLICIES / f"{run}.safetensors"
    if not run.exists() and small.exists():
        with safe_open(small, "pt") as file:
            settings = json.loads(file.metadata()["settings"])
            weights = {key: file.get_tensor(key).float() for key in file.keys()}
    else:
        for name in ("config.json", "policy.pt"):
            if not (run / name).exists():
                names = ", ".join(sorted(file.stem for file in POLICIES.glob("*.safetensors")))
                advice = f"there are those of finished runs, and of {names}"
                raise ValueError(f"{run} holds no policy: {name} is missing ({advice})")
        settings = json.loads((run / "config.json").read_text())
        weights = torch.load(run / "policy.pt", "cpu", weights_only=True)
    observations = Box(-np.inf, np.inf, weights["norm.mean"].shape)
    actions = Box(-1, 1, (len(weights["mean_actor.head.bias"]) // 2,))
    agent = sac.SAC(observations, actions, sac.Config(hidden=settings["hidden"]))
    agent.load_state_dict(weights, strict=False)
    return agent, settings


FILES = "config.json metrics.csv policy.pt result.json curve.png video.gif play.gif".split()


def remove_files(folder: Path, *names: str):
    """Removes these of its files, and those half written. The folder may be a link."""
    for name in names:
        for file in *folder.glob(name), *folder.glob(f"{name}.part"):
            file.unlink(missing_ok=True)


def remove_checkpoint(folder: Path):
    remove_files(folder, "state.pt", "round*.npy")
    if folder.is_symlink():
        folder.unlink()
    elif folder.exists():
        folder.rmdir()  # fails if it holds anything else


def remove_run(folder: Path):
    """Removes what a training left in a folder, and nothing else."""
    remove_checkpoint(folder / "checkpoint")
    remove_files(folder, *FILES)


@contextlib.contextmanager
def new_folder(folder: Path) -> Iterator[None]:
    """Makes a folder. If that is all that comes of it, an error takes it away again."""
    new = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    try:
        yield
    except BaseException:
        with contextlib.suppress(OSError):  # one that holds something
            for path in new:
                path.rmdir()
        raise


def read_metrics(path: Path) -> list[dict]:
    """A run's metrics.csv: a dict of numbers for each round, without what is empty."""
    with open(path, newline="") as file:
        return [{k: float(v) for k, v in row.items() if v} for row in csv.DictReader(file)]


def short(model: str) -> str:
    """A model's name as a folder may have it."""
    if model.startswith("local-dir:"):
        model = Path(model.removeprefix("local-dir:")).resolve().name
    return model.replace("/", "-").replace(":", "-")


def check_free(out: Path, overwrite: bool, *marks: str):
    """Raises ValueError unless a folder is new or empty, or holds `marks` and may be replaced."""
    ours = all((out / mark).exists() for mark in marks)
    if out.is_file() or out.is_dir() and any(out.iterdir()) and not (overwrite and ours):
        resume = " (an interrupted training goes on by --resume)" if "metrics.csv" in marks else ""
        advice = f"replace it by --overwrite{resume}, or " if ours else ""
        kind = ", ".join(marks) if ours else "other files"
        raise ValueError(f"{out} already holds {kind}: {advice}name another folder by --out")


class Checkpoint:
    """A folder from which an interrupted training goes on, on a CPU to the same last byte.

    state.pt has the agent, its optimizers and the progress. The replay buffer is filled again from
    a file for each round. round_size: environment steps in a round. Of several processes, only the
    one that writes calls save.
    """

    def __init__(self, folder: Path, agent: sac.SAC, round_size: int, processes: int = 1):
        self.folder, self.agent, self.round_size = folder, agent, round_size
        self.settings = vars(agent.config) | dict(processes=processes, round_size=round_size)
        self.progress = sac.Progress(agent, round_size)
        # the last so many steps, a whole number of rounds, fill the buffer
        self.remembered = math.ceil(self.progress.buffer.size / round_size) * round_size

    def round_file(self, start: int) -> Path:
        """Of the transitions of the round that began after `start` steps."""
        return self.folder / f"round{start}.npy"

    def restore(self) -> sac.Progress:
        """Puts the agent where the training stopped, if it did, and returns where that was."""
        path, progress = self.folder / "state.pt", self.progress
        if not path.exists():
            return progress
        try:
            saved = dict(torch.load(path, map_location=self.agent.device, weights_only=True))
        except Exception as error:  # whatever unpickling meets
            raise ValueError(f"{path} is damaged ({str(error)[:99]})") from error
        there, here = saved["settings"], self.settings
        differ = [key for key in there if there[key] != here.get(key)]
        if differ:
            others = [f"{key} {there[key]} there, {here.get(key)} here" for key in differ]
            raise ValueError(f"{self.folder} is of other settings: {'; '.join(others)}")
        self.agent.load_state_dict(saved["agent"])
        for optimizer, state in zip(self.agent.optimizers, saved["optimizers"]):
            optimizer.load_state_dict(state)
        for key in ("steps", "weights", "best_reward", "best"):
            setattr(progress, key, saved[key])
        self.fill_buffer()
        return progress

    def fill_buffer(self):
        buffer, steps = self.progress.buffer, self.progress.steps
        oldest = max(0, steps - self.remembered)
        buffer.next = oldest % buffer.size  # where that round's rows lay
        for start in range(oldest, steps, self.round_size):
            path = self.round_file(start)
            try:
                buffer.add(torch.from_numpy(np.load(path).reshape(-1, sum(buffer.widths))))
            except (ValueError, EOFError) as error:
                raise ValueError(f"{path} is damaged ({error})") from error

    def save(self):
        """To be called after a round, when all else that is to be kept of it is on the disk."""
        buffer, steps, count = self.progress.buffer, self.progress.steps, self.round_size
        with atomic_open(self.round_file(steps - count)) as file:
            np.save(file, buffer.data[(buffer.next - count + torch.arange(count)) % buffer.size])
        names = "steps", "weights", "best_reward", "best"
        state = {name: getattr(self.progress, name) for name in names}
        state |= dict(settings=self.settings, agent=self.agent.state_dict())
        state["optimizers"] = [optimizer.state_dict() for optimizer in self.agent.optimizers]
        with atomic_open(self.folder / "state.pt") as file:
            torch.save(state, file)
        # One round more is kept than the buffer holds: the state before may still be needed.
        self.round_file(steps - self.remembered - 2 * count).unlink(missing_ok=True)
