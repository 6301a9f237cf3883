"""Makes states.npz, the fixed states on which `vlmrm.py evaluate` judges rewards: python evaluation/make_states.py

None of them is among the states that the embedded CLIP was trained on: other seeds, other scripts. All are labelled by
the tasks' success conditions when they are used. For each of the eight tasks:

    scripted NAME      150 that meet its condition, from the joint angles below, jittered, with random arms
    half-trained NAME  60 from the middle of a SAC run of 40,000 steps on an earlier embedded CLIP's reward for the task
    trained NAME       120 from the last tenth of that run

and 300 that are blends of two such scripts or have a leg of each, 200 of uniformly random joints, let go of and settled
under gravity, and 200 of a random policy.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent / "tinyclip"))
import make  # tinyclip/make.py, which finds vlmrm
import vlmrm
import mujoco
import numpy as np

SEED = 7_000_000
# degrees: (hip_x, hip_z, hip_y, knee) of the left leg, of the right; abdomen_y, the torso's pitch, and spread of jitter
STAND, LIFT = (-3, -2, -4, -6), (-8, -6, -45, -70)
SCRIPTS = {
    "kneeling": [((-8, -6, -8, -98), (-8, -6, -8, -98), 0, 0, 8), ((-3, -4, -35, -132), (-3, -4, -35, -132), -8, 0, 8)],
    "lotus": [
        ((-8, -52, -50, -150), (-8, -52, -50, -150), -20, 0, 7),
        ((-12, -54, -75, -154), (-12, -54, -75, -154), 8, 8, 7),
    ],
    "standing": [(STAND, STAND, 0, 0, 4)],
    "arms-raised": [(STAND, STAND, 0, 0, 4)],
    "splits": [
        ((-24, -58, -75, -5), (-24, -58, -75, -5), -6, 0, 5),
        ((-20, -52, -83, -6), (-20, -52, -83, -6), -4, 3, 6),
    ],
    "hands-on-hips": [(STAND, STAND, 0, 0, 4)],
    "one-leg": [(STAND, LIFT, 0, 0, 6), (STAND, (-14, -8, -8, -95), 0, 0, 6), (STAND, (-22, -12, -30, -25), 0, 0, 6)],
    "arms-crossed": [(STAND, STAND, 0, 0, 4)],
}


def pose(task, body, rng):
    """A pose of the task's script, jittered and turned, with random arms; not yet on the floor."""
    left, right, abdomen, pitch, jitter = SCRIPTS[task][rng.integers(len(SCRIPTS[task]))]
    qpos = body.model.qpos0.copy()
    qpos[body.legs] = np.deg2rad(np.concatenate([left, right] if rng.random() < 0.5 else [right, left]))
    qpos[body.abdomen] = np.deg2rad(abdomen)
    qpos[3:7] = make.quaternion(rng.normal(0, 0.3), *np.deg2rad([pitch, 0] + 4 * rng.standard_normal(2)))
    qpos[7:] += np.deg2rad(jitter) * rng.standard_normal(17)
    low, high = body.low[[a - 7 for a in body.arms]], body.high[[a - 7 for a in body.arms]]
    arms = rng.uniform(low, high)
    if rng.random() < 0.7:  # both alike, as in most of what has a name
        arms[3:] = arms[:3] * [-1, -1, 1]
    qpos[body.arms] = np.clip(arms, low, high)
    return qpos


def scripted(task, count=150):
    """Poses that meet the task's condition, found by trying; half of them have the arms of an earlier one, jittered."""
    rng, body, states = np.random.default_rng([SEED, list(SCRIPTS).index(task)]), make.Body(), []
    while len(states) < count:
        qpos = pose(task, body, rng)
        if states and rng.random() < 0.5:
            qpos[body.arms] = states[rng.integers(len(states))][body.arms] + np.deg2rad(10) * rng.standard_normal(6)
        body.ground(qpos, rng.uniform(0, 0.01))
        if vlmrm.holds(vlmrm.TASKS[task][1], vlmrm.measure_states(body.model, qpos[None]))[0]:
            states.append(qpos)
    return np.array(states)


def between(count=300):
    """Poses between two tasks' scripts, or with a leg of each: near misses of many kinds."""
    rng, body, states = np.random.default_rng([SEED, 99]), make.Body(), []
    for i in range(count):
        one, other = (pose(list(SCRIPTS)[k], body, rng) for k in rng.integers(len(SCRIPTS), size=2))
        if i % 2:
            one[body.legs[4:]] = other[body.legs[4:]]
        else:
            t = rng.random()
            one = (1 - t) * one + t * other
        states.append(body.ground(one, rng.uniform(0, 0.01)))
    return np.array(states)


def settled(count=200):
    rng, body, states = np.random.default_rng([SEED, 100]), make.Body(), []
    for _ in range(count):
        qpos = body.model.qpos0.copy()
        qpos[7:] = rng.uniform(body.low, body.high)
        qpos[3:7] = make.quaternion(rng.uniform(-np.pi, np.pi), *(np.deg2rad(30) * rng.standard_normal(2)))
        states += body.settle(body.ground(qpos, 0.02), rng.choice([0, 100, 400]), [int(rng.integers(5, 80))])
    return np.array(states)


def random_policy(count=200):
    rng, body, states = np.random.default_rng([SEED, 101]), make.Body(), []
    for _ in range(count):
        mujoco.mj_resetData(body.model, body.data)
        body.data.qpos[:] += rng.uniform(-0.01, 0.01, 24)
        for _ in range(rng.integers(100)):
            body.data.ctrl[:] = rng.uniform(-0.4, 0.4, 17)
            mujoco.mj_step(body.model, body.data, nstep=5)
        states.append(body.data.qpos.copy())
    return np.array(states)


def policy(task, steps=40_000):
    """States of the middle of training, and of its end."""
    number = list(SCRIPTS).index(task)
    visited = make.visited_states(vlmrm.TASKS[task][0], SEED + number, steps, make.FOLDER)
    n, rng = len(visited), np.random.default_rng([SEED, 200 + number])
    middle, end = np.arange(n * 4 // 10, n * 6 // 10), np.arange(n * 9 // 10, n)
    return visited[rng.choice(middle, 60, replace=False)], visited[rng.choice(end, 120, replace=False)]


def main():
    tasks = list(SCRIPTS)
    found = {"between": between(), "settled": settled(), "random policy": random_policy()}
    found |= {f"scripted {task}": scripted(task) for task in tasks}
    for task, (half, end) in zip(tasks, make.in_parallel(policy, [(t,) for t in tasks])):
        found |= {f"half-trained {task}": half, f"trained {task}": end}
    origin = np.concatenate([[name] * len(states) for name, states in found.items()])
    states = np.concatenate(list(found.values())).astype(np.float32)
    np.savez_compressed(Path(__file__).parent / "states.npz", states=states, origin=origin)
    print(f"{len(states)} states")
    pose = vlmrm.measure_states(vlmrm.Scene().model, states)
    for task, (_, condition) in vlmrm.TASKS.items():
        print(f"  {task}: {vlmrm.holds(condition, pose).sum()} goal states")


if __name__ == "__main__":
    main()
