"""The fixed states on which rewards are judged (states.npz, made by make_states.py), and their use.

A state is MuJoCo's qpos (24,): the root's position in metres (3), its quaternion (4), and 17 joint
angles in radians.
"""

from pathlib import Path

import vlmrm  # before mujoco: it chooses how to draw
import mujoco
import numpy as np
import torch
from tinyclip.poses import lowest_point
from torch import Tensor
from tqdm import tqdm

EVALUATION_STATES = Path(__file__).parent / "states.npz"


def load_states() -> tuple[np.ndarray, np.ndarray]:
    """All evaluation states, qpos (N, 24), and where each comes from, (N,), as "scripted lotus"."""
    with np.load(EVALUATION_STATES) as file:
        return file["states"].astype(float), file["origin"]


def goal_states(task: str) -> np.ndarray:
    """Scripted poses that meet the condition of a task in vlmrm.JUDGED, qpos (N, 24).

    Those of two poses at once have the arms of other poses. Raises ValueError for any other task.
    """
    if task not in vlmrm.JUDGED:
        raise ValueError(f"the task is {task!r}; it has to be one of {', '.join(vlmrm.JUDGED)}")
    states, origin = load_states()
    states = states[np.char.startswith(origin, "scripted")]
    if task not in vlmrm.TASKS:
        from evaluation.make_states import MORE, scripted  # which imports this module

        if task in MORE:
            return scripted(task)
        states = np.concatenate([states, *(scripted(pose) for pose in MORE if pose in task)])
        times = 8 if task in vlmrm.COMPOSITIONS else 16
        states, rng = np.repeat(states, times, 0), np.random.default_rng(0)
        both, right, left = slice(18, 24), slice(18, 21), slice(21, 24)  # the joints of the arms
        for joints in [both] if task in vlmrm.COMPOSITIONS else [right, left]:
            states[:, joints] = states[rng.permutation(len(states)), joints]
    _, condition = vlmrm.JUDGED[task]
    return states[vlmrm.holds(condition, vlmrm.measure_states(vlmrm.Scene().model, states))]


def pose_path(
    model: mujoco.MjModel, start: np.ndarray, goal: np.ndarray, count: int = 25
) -> np.ndarray:
    """`count` states from one qpos (24,) to another, (count, 24), always on the floor.

    Each joint moves in equal steps.
    """
    data, path = mujoco.MjData(model), []
    if start[3:7] @ goal[3:7] < 0:  # take the same orientation, nearer as a quaternion
        start = np.concatenate([start[:3], -start[3:7], start[7:]])
    for t in np.linspace(0, 1, count):
        data.qpos[:] = (1 - t) * start + t * goal
        data.qpos[2] -= lowest_point(model, data)
        path.append(data.qpos.copy())
    return np.array(path)


def embed_states(clip: vlmrm.CLIP, scene: vlmrm.Scene, states: np.ndarray, bar: tqdm) -> Tensor:
    """qpos (N, 24) -> embeddings of their pictures (N, D).

    Some hundred at a time, to bound the memory. Each moves the progress bar on by one.
    """
    parts = []
    for part in np.array_split(states, -(-len(states) // 256)):
        parts.append(clip.embed_images(vlmrm.render_states(scene, part)))
        bar.update(len(part))
    return torch.cat(parts)
