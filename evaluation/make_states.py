"""Makes states.npz, the fixed states on which `vlmrm.py evaluate` judges rewards:

    python evaluation/make_states.py

They are of this robot, of which the embedded CLIP saw no state in training. All are labelled by the
tasks' success conditions when they are used. The file that comes with this repository was made with
an earlier embedded CLIP, and crossed arms were judged from the pelvis. Running this replaces it by
other states. For each of the eight tasks:

    scripted NAME      150 that meet its condition, from the joint angles below, jittered, with
                       random arms
    half-trained NAME  60 from the middle of a SAC run of 40,000 steps on the embedded CLIP's reward
                       for the task
    trained NAME       120 from the last tenth of that run

and 300 that are blends of two such scripts or have a leg of each, 200 of uniformly random joints,
let go of and settled under gravity, and 200 of a random policy.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
import vlmrm  # before mujoco: it chooses how to draw
import sac
import torch
import gymnasium
import mujoco
import numpy as np
from evaluation.states import EVALUATION_STATES
from tinyclip.poses import Simulator, in_parallel, quaternion

SEED = 7_000_000
# degrees: (hip_x, hip_z, hip_y, knee) of the left leg, of the right; abdomen_y, the torso's pitch,
# and the spread of the jitter
STAND, LIFT = (-3, -2, -4, -6), (-8, -6, -45, -70)
KNEEL, ON_HEELS = (-8, -6, -8, -98), (-3, -4, -35, -132)
LOTUS, LOTUS_FOLDED = (-8, -52, -50, -150), (-12, -54, -75, -154)
SPLITS, SPLITS_FORWARD = (-24, -58, -75, -5), (-20, -52, -83, -6)
SCRIPTS = {
    "kneeling": [(KNEEL, KNEEL, 0, 0, 8), (ON_HEELS, ON_HEELS, -8, 0, 8)],
    "lotus": [(LOTUS, LOTUS, -20, 0, 7), (LOTUS_FOLDED, LOTUS_FOLDED, 8, 8, 7)],
    "standing": [(STAND, STAND, 0, 0, 4)],
    "arms-raised": [(STAND, STAND, 0, 0, 4)],
    "splits": [(SPLITS, SPLITS, -6, 0, 5), (SPLITS_FORWARD, SPLITS_FORWARD, -4, 3, 6)],
    "hands-on-hips": [(STAND, STAND, 0, 0, 4)],
    "one-leg": [
        (STAND, LIFT, 0, 0, 6),
        (STAND, (-14, -8, -8, -95), 0, 0, 6),
        (STAND, (-22, -12, -30, -25), 0, 0, 6),
    ],
    "arms-crossed": [(STAND, STAND, 0, 0, 4)],
}
# Not in states.npz: goal poses of tasks that are not the paper's
SQUAT, SIT = (-8, -20, -110, -120), (-2, -4, -86, -4)
MORE = {"squatting": [(SQUAT, SQUAT, -20, 18, 7)], "sitting": [(SIT, SIT, -4, 0, 5)]}


def robot() -> Simulator:
    """The robot that is judged."""
    return Simulator(vlmrm.Scene().model)


def scripted_pose(task: str, sim: Simulator, rng: np.random.Generator) -> np.ndarray:
    """A pose of the task's script, jittered and turned, with random arms; not yet on the floor."""
    scripts = (SCRIPTS | MORE)[task]
    left, right, abdomen, pitch, jitter = scripts[rng.integers(len(scripts))]
    qpos = sim.model.qpos0.copy()
    legs = [left, right] if rng.random() < 0.5 else [right, left]
    qpos[sim.legs] = np.deg2rad(np.concatenate(legs))
    qpos[sim.abdomen] = np.deg2rad(abdomen)
    yaw = rng.normal(0, 0.3)
    qpos[3:7] = quaternion(yaw, *np.deg2rad([pitch, 0] + 4 * rng.standard_normal(2)))
    qpos[7:] += np.deg2rad(jitter) * rng.standard_normal(17)
    low, high = sim.limits(sim.arms)
    arms = rng.uniform(low, high)
    if rng.random() < 0.7:  # both alike, as in most of what has a name
        arms[3:] = arms[:3] * [-1, -1, 1]
    qpos[sim.arms] = np.clip(arms, low, high)
    return qpos


def scripted(task: str, count: int = 150) -> np.ndarray:
    """Poses that meet the task's condition, found by trying, (count, 24).

    Half of the tried have the arms of an earlier one, jittered.
    """
    rng, sim = np.random.default_rng([SEED, list(SCRIPTS | MORE).index(task)]), robot()
    condition, states = vlmrm.JUDGED[task][1], []
    while len(states) < count:
        qpos = scripted_pose(task, sim, rng)
        if states and rng.random() < 0.5:
            arms = states[rng.integers(len(states))][sim.arms]
            qpos[sim.arms] = arms + np.deg2rad(10) * rng.standard_normal(6)
        sim.ground(qpos, rng.uniform(0, 0.01))
        if vlmrm.holds(condition, vlmrm.measure_states(sim.model, qpos[None]))[0]:
            states.append(qpos)
    return np.array(states)


def between(count: int = 300) -> np.ndarray:
    """Poses between two scripts, or with a leg of each: near misses of many kinds, (count, 24)."""
    rng, sim, states = np.random.default_rng([SEED, 99]), robot(), []
    tasks = list(SCRIPTS)
    for i in range(count):
        pair = rng.integers(len(tasks), size=2)
        one, other = (scripted_pose(tasks[k], sim, rng) for k in pair)
        if i % 2:
            one[sim.legs[4:]] = other[sim.legs[4:]]
        else:
            t = rng.random()
            one = (1 - t) * one + t * other
        states.append(sim.ground(one, rng.uniform(0, 0.01)))
    return np.array(states)


def settled(count: int = 200) -> np.ndarray:
    """Random joints, let go of and settled under gravity, (count, 24)."""
    rng, sim, states = np.random.default_rng([SEED, 100]), robot(), []
    for _ in range(count):
        qpos = sim.model.qpos0.copy()
        qpos[7:] = rng.uniform(sim.low, sim.high)
        yaw = rng.uniform(-np.pi, np.pi)
        qpos[3:7] = quaternion(yaw, *(np.deg2rad(30) * rng.standard_normal(2)))
        stiffness = rng.choice([0, 100, 400])
        states += sim.settle(sim.ground(qpos, 0.02), stiffness, [int(rng.integers(5, 80))])
    return np.array(states)


def random_policy(count: int = 200) -> np.ndarray:
    """Where up to 100 uniformly random actions lead, (count, 24)."""
    rng, sim, states = np.random.default_rng([SEED, 101]), robot(), []
    for _ in range(count):
        mujoco.mj_resetData(sim.model, sim.data)
        sim.data.qpos[:] += rng.uniform(-0.01, 0.01, 24)
        for _ in range(rng.integers(100)):
            sim.data.ctrl[:] = rng.uniform(-0.4, 0.4, 17)
            mujoco.mj_step(sim.model, sim.data, nstep=5)
        states.append(sim.data.qpos.copy())
    return np.array(states)


def visited_states(prompt: str, seed: int, steps: int) -> np.ndarray:
    """Trains SAC on the embedded CLIP's reward for a prompt, for so many steps.

    Returns all states that it met, in order, float32 (N, 24).
    """
    torch.set_num_threads(1)
    visited = []

    class Recorder(vlmrm.Humanoid):
        def step(self, action):
            result = super().step(action)
            visited.append(self.data.qpos.astype(np.float32))
            return result

    clip = vlmrm.CLIP()
    reward_fn, scene = vlmrm.VLMReward(clip, prompt, vlmrm.BASELINE_PROMPT), vlmrm.Scene(clip.size)

    def make_env():
        return gymnasium.wrappers.TimeLimit(Recorder(scene), 100)

    envs = gymnasium.vector.SyncVectorEnv([make_env] * 16, autoreset_mode="Disabled")
    config = sac.Config(steps=steps, seed=seed)
    agent = sac.SAC(envs.single_observation_space, envs.single_action_space, config)
    rows = sac.train(agent, sac.Player(envs, reward_fn, config))
    best = max(row.get("eval_reward", 0) for row in rows)
    print(f"  {prompt}: best reward {best:.3f}", flush=True)
    return np.array(visited)


def policy(task: str, steps: int = 40_000) -> tuple[np.ndarray, np.ndarray]:
    """States of the middle of a training, (60, 24), and of its end, (120, 24)."""
    number = list(SCRIPTS).index(task)
    visited = visited_states(vlmrm.TASKS[task][0], SEED + number, steps)
    n, rng = len(visited), np.random.default_rng([SEED, 200 + number])
    middle, end = np.arange(n * 4 // 10, n * 6 // 10), np.arange(n * 9 // 10, n)
    half = visited[rng.choice(middle, 60, replace=False)]
    return half, visited[rng.choice(end, 120, replace=False)]


def main():
    about = "Makes states.npz, the fixed states on which rewards are judged. Trains eight policies."
    argparse.ArgumentParser(description=about).parse_args()
    tasks = list(SCRIPTS)
    found = {"between": between(), "settled": settled(), "random policy": random_policy()}
    found |= {f"scripted {task}": scripted(task) for task in tasks}
    for task, (half, end) in zip(tasks, in_parallel(policy, [(task,) for task in tasks])):
        found |= {f"half-trained {task}": half, f"trained {task}": end}
    origin = np.concatenate([[name] * len(states) for name, states in found.items()])
    states = np.concatenate(list(found.values())).astype(np.float32)
    np.savez_compressed(EVALUATION_STATES, states=states, origin=origin)
    print(f"{len(states)} states")
    pose = vlmrm.measure_states(vlmrm.Scene().model, states)
    for task, (_, condition) in vlmrm.TASKS.items():
        print(f"  {task}: {vlmrm.holds(condition, pose).sum()} goal states")


if __name__ == "__main__":
    main()
