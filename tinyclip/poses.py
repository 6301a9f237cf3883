"""The states that the embedded CLIP is trained on: where poses come from, without any success rule.

    scripts     joint angles for poses with a name, blended, mixed, jittered, with random arms
    settling    gravity acts on a pose that weak motors try to hold
    policies    random ones, and ones that SAC trains on the reward of a CLIP
    climbs      poses changed at random as long as a CLIP rewards it: what that CLIP likes

A state is MuJoCo's qpos (24,): the root's position in metres (3), its quaternion (4), and 17 joint
angles in radians.
"""

import json
import multiprocessing
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import vlmrm  # before mujoco: it chooses how to draw
import sac
import torch
import gymnasium
import mujoco
import numpy as np
from tinyclip.captions import ARMS, arms_of, held_out

# --------------------------------------------------------------------------------------------------
# Scripts


class Script(NamedTuple):
    """A pose in degrees, standing where nothing is said."""

    left: tuple  # of this leg (hip_x, hip_z, hip_y, knee)
    right: tuple | None = None  # as the left one
    abdomen: float = 0  # abdomen_y
    pitch: float = 0  # of the torso, as the next
    roll: float = 0


POSES = [
    # stand (often: half of the prompts ask for it, with other arms), squat, bow
    *[Script((0, 0, 0, -2))] * 30,
    Script((0, 0, -35, -60), abdomen=-10),
    Script((-5, -25, -95, -125), abdomen=-30, pitch=15),
    Script((-10, -40, -105, -150), abdomen=-40, pitch=15),
    Script((0, 0, -40, -5), abdomen=-50, pitch=20),
    Script((-20, 0, 0, -2)),
    # one leg
    Script((0, 0, 0, -2), (0, 0, -60, -80)),
    Script((0, 0, 0, -2), (0, 0, -60, -5)),
    Script((0, 0, 0, -2), (-25, -10, -20, -10)),
    Script((0, 0, 0, -2), (0, 0, 5, -110)),
    Script((0, 0, 0, -2), (-25, -55, -60, -130)),
    Script((0, 0, 0, -2), (0, 0, -25, -60)),
    # kneel, one knee, all fours
    Script((0, 0, 0, -90)),
    Script((-20, -10, 0, -90)),
    Script((0, 0, -15, -110)),
    Script((0, 0, -60, -150)),
    Script((-5, -15, -70, -158)),
    Script((0, 0, -50, -140), abdomen=-60, pitch=30),
    Script((0, 0, 0, -95), (0, 0, -90, -90)),
    Script((0, 0, 15, -60), (0, 0, -80, -80)),
    Script((0, 0, -90, -90), abdomen=-5, pitch=85),
    Script((0, 0, -60, -90), (0, 0, -100, -90), abdomen=-10, pitch=80),
    # lotus
    Script((-10, -48, -30, -158), abdomen=-30),
    Script((-15, -55, -85, -155), abdomen=20, pitch=15),
    Script((-5, -55, -60, -155)),
    Script((-17, -50, -95, -158), abdomen=22, pitch=20),
    Script((0, -52, -24, -158), abdomen=-18, pitch=-30),
    Script((-4, -57, -28, -157), abdomen=-50),
    # sit
    Script((0, 0, -85, -5)),
    Script((0, 0, -100, -70)),
    Script((0, 0, -110, -130), abdomen=-20, pitch=-10),
    # splits (often: few stay so), straddle, half of the splits
    *[
        Script((-25, -60, -80, -2)),
        Script((-25, -58, -70, -4), abdomen=-10),
        Script((-15, -35, -85, -5)),
    ]
    * 3,
    Script((-25, -60, -80, -60)),
    Script((-25, -60, -80, -2), (0, -20, -85, -120)),
    Script((-25, -60, -80, -2), (0, 0, -30, -150)),
    Script((0, 0, 20, -5), (0, 0, -100, -5)),
    # lie, curl, fall
    Script((0, 0, 0, -5), pitch=-88),
    Script((0, 0, 0, -5), pitch=88),
    Script((0, 0, 10, -80), abdomen=20, pitch=-80),
    Script((0, 0, -100, -120), abdomen=-40, pitch=-80),
    Script((0, 0, -20, -20), abdomen=-10, roll=85),
    Script((0, 0, 0, -5), pitch=30),
    Script((0, 0, 0, -20), pitch=-30),
]
SIDE_NAMES = "left", "right"
LEG_JOINTS = [
    f"{side}_{joint}" for side in SIDE_NAMES for joint in "hip_x hip_z hip_y knee".split()
]
ARM_JOINTS = [
    f"{side}_{joint}" for side in SIDE_NAMES for joint in "shoulder1 shoulder2 elbow".split()
]


def quaternion(yaw: float, pitch: float, roll: float) -> np.ndarray:
    """Angles in radians -> a unit quaternion (4,)."""
    result = np.zeros(4)
    mujoco.mju_euler2Quat(result, np.array([yaw, pitch, roll]), "zyx")
    return result


def turned(by: np.ndarray, orientation: np.ndarray) -> np.ndarray:
    """An orientation, turned further by another: quaternions (4,) all."""
    result = np.zeros(4)
    mujoco.mju_mulQuat(result, by, orientation)
    return result


def lowest_point(model: mujoco.MjModel, data: mujoco.MjData) -> float:
    """Height of the body's lowest point above the floor, in metres."""
    mujoco.mj_kinematics(model, data)
    # geom 0 is the floor; the rest are spheres and capsules. A capsule reaches half its length as
    # far as that points up or down, and both reach a radius further
    capsule = model.geom_type[1:] == mujoco.mjtGeom.mjGEOM_CAPSULE
    half = np.where(capsule, np.abs(data.geom_xmat[1:, 8]) * model.geom_size[1:, 1], 0)
    return float((data.geom_xpos[1:, 2] - model.geom_size[1:, 0] - half).min())


class Body:
    """The simulator, to put the robot into poses and let go of it.

    low, high: limits of the 17 joints, in radians. legs, arms, abdomen, waist: where in qpos their
    joints are, left before right. qpos[7:] are the joints, in the order of low and high.
    """

    def __init__(self):
        self.model = vlmrm.Scene().model
        self.data = mujoco.MjData(self.model)
        self.low, self.high = self.model.jnt_range[1:].T  # joint 0 is the root, which is free
        joints = [self.model.joint(j) for j in range(1, self.model.njnt)]
        address = {joint.name: joint.qposadr[0] for joint in joints}
        self.legs = [address[name] for name in LEG_JOINTS]
        self.arms = [address[name] for name in ARM_JOINTS]
        self.abdomen, self.waist = (
            address["abdomen_y"],
            [address["abdomen_x"], address["abdomen_z"]],
        )
        motors = [self.model.actuator(i).name for i in range(self.model.nu)]
        self.motors = np.array([address[name] for name in motors])
        self.gear = self.model.actuator_gear[:, 0]

    def limits(self, places: list[int]) -> tuple[np.ndarray, np.ndarray]:
        """Lower and upper limits, in radians, of the joints at n places in qpos: (n,) each."""
        joints = np.array(places) - 7
        return self.low[joints], self.high[joints]

    def scripted(self, rng: np.random.Generator) -> np.ndarray:
        """One of POSES, or its mirror image, as qpos (24,); not yet on the floor."""
        script = POSES[rng.integers(len(POSES))]
        legs = [script.left, script.right or script.left]
        if rng.random() < 0.5:
            legs.reverse()
        qpos = self.model.qpos0.copy()
        qpos[self.legs] = np.deg2rad(np.concatenate(legs))
        qpos[self.abdomen] = np.deg2rad(script.abdomen)
        qpos[3:7] = quaternion(0, *np.deg2rad([script.pitch, script.roll]))
        return qpos

    def ground(self, qpos: np.ndarray, clearance: float) -> np.ndarray:
        """Keeps the joints' limits, and puts the lowest point `clearance` metres above the floor.

        Changes qpos (24,) in place, and returns it.
        """
        qpos[7:] = np.clip(qpos[7:], self.low, self.high)
        self.data.qpos[:] = qpos
        qpos[2] -= lowest_point(self.model, self.data) - clearance
        return qpos

    def settle(self, qpos: np.ndarray, stiffness: float, snapshots) -> list[np.ndarray]:
        """Lets gravity act while motors (stiffness: N m/rad) try to hold the pose qpos (24,).

        Returns the states after each number of steps of 15 ms in `snapshots`, which ascends.
        """
        mujoco.mj_resetData(self.model, self.data)
        self.data.qpos[:] = qpos
        states = []
        for i in range(max(snapshots) + 1):
            if i in snapshots:
                states.append(self.data.qpos.copy())
            missing = (qpos - self.data.qpos)[self.motors]
            speed = self.data.qvel[self.motors - 1]  # the root has one number less in qvel
            torque = stiffness * missing - 0.1 * stiffness * speed
            self.data.ctrl[:] = np.clip(torque / self.gear, -0.4, 0.4)
            mujoco.mj_step(self.model, self.data, nstep=5)
        return states


def arm_library(body: Body, rng: np.random.Generator, each: int = 200) -> np.ndarray:
    """Angles of both arms (n, 6) in radians, found by trying random ones.

    `each` of every label in ARMS, and three times as many of those that the prompts name.
    """
    low, high = body.limits(body.arms)
    angles = rng.uniform(low, high, (40_000, 6))
    mirrored = rng.random(len(angles)) < 0.7
    noise = rng.normal(0, 0.1, (mirrored.sum(), 3))
    angles[mirrored, 3:] = angles[mirrored, :3] * [-1, -1, 1] + noise
    states = np.tile(body.model.qpos0, (len(angles), 1))
    states[:, body.arms] = np.clip(angles, low, high)
    labels = arms_of(vlmrm.measure_states(body.model, states))
    found = []
    for name in [*ARMS, "raised", "raised", "crossed", "crossed", "hips", "hips"]:
        some = states[labels == ARMS.index(name)]
        found.append(some[rng.integers(len(some), size=each)][:, body.arms])
    return np.concatenate(found)


def random_pose(body: Body, arms: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """A pose near the floor, qpos (24,), with arms of an arm_library.

    Scripted, between two scripts, each leg from another, or random; then jittered, turned, tilted.
    """
    qpos, kind = body.scripted(rng), rng.random()
    if kind < 0.22:
        t = rng.random()
        qpos = (1 - t) * qpos + t * body.scripted(rng)
    elif kind < 0.40:
        qpos[body.legs[4:]] = body.scripted(rng)[body.legs[4:]]
    elif kind < 0.47:
        qpos[7:] = rng.uniform(body.low, body.high)
    if rng.random() < 0.4:  # policies like to twist
        qpos[body.waist] = rng.uniform(body.low, body.high)[np.array(body.waist) - 7]
    qpos[7:] += np.deg2rad(rng.choice([2, 6, 12])) * rng.standard_normal(17)
    qpos[body.arms] = arms[rng.integers(len(arms))] + np.deg2rad(4) * rng.standard_normal(6)
    yaw = rng.normal(0, 0.35) if rng.random() < 0.8 else rng.uniform(-np.pi, np.pi)
    tilt = np.deg2rad(rng.choice([3, 8, 25], p=[0.5, 0.35, 0.15]) * rng.standard_normal(2))
    qpos[3:7] = turned(quaternion(yaw, *tilt), qpos[3:7] / np.linalg.norm(qpos[3:7]))
    return body.ground(qpos, 0.01 if rng.random() < 0.93 else rng.uniform(0, 0.5))


def around(body: Body, states: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """What lies around states (N, 24): each jittered by 5 or 15 degrees, and where it settles.

    Returns three states of each, (3 N, 24).
    """
    near = []
    for qpos in states.astype(float):
        qpos[7:] += np.deg2rad(rng.choice([5, 15])) * rng.standard_normal(17)
        near += body.settle(body.ground(qpos, 0.005), rng.choice([60, 300]), [0, 15, 40])
    return np.array(near, np.float32)


# --------------------------------------------------------------------------------------------------
# Before there is a CLIP


def make_states(seed: int, poses: int, settled: int, episodes: int) -> np.ndarray:
    """One process' share of the first states, (poses + 5 settled + 25 episodes, 24).

    `poses` as they are, `settled` ones at 5 moments each, `episodes` of random policies.
    """
    rng, body = np.random.default_rng(seed), Body()
    arms = arm_library(body, rng)
    states = [random_pose(body, arms, rng) for _ in range(poses)]
    for _ in range(settled):
        snapshots = np.sort(rng.choice(np.arange(2, 80), 5, replace=False))
        qpos = random_pose(body, arms, rng)
        states += body.settle(qpos, rng.choice([0, 20, 60, 150, 300, 600]), snapshots)
    for _ in range(episodes):
        states += random_policy(body, rng)
    return np.array(states, np.float32)


def random_policy(body: Body, rng: np.random.Generator) -> Iterator[np.ndarray]:
    """Every fourth state of an episode of 100 random actions, which follow each other smoothly."""
    mujoco.mj_resetData(body.model, body.data)
    body.data.qpos[:] += rng.uniform(-0.01, 0.01, 24)
    action, memory = np.zeros(17), rng.choice([0, 0.8, 0.95])
    for i in range(100):
        action = memory * action + np.sqrt(1 - memory**2) * rng.uniform(-0.7, 0.7, 17)
        body.data.ctrl[:] = np.clip(action, -0.4, 0.4)
        mujoco.mj_step(body.model, body.data, nstep=5)
        if i % 4 == 0:
            yield body.data.qpos.copy()


# --------------------------------------------------------------------------------------------------
# What a CLIP likes: found by climbing, and by policies


def climb(
    prompt: str,
    rng: np.random.Generator,
    model: str,
    climbers: int = 96,
    tries: int = 120,
    alpha: float = 0.5,
) -> np.ndarray:
    """What a CLIP likes, found without a policy: every change of a pose stays that earns more.

    The best fifth of random poses climb; model and alpha are those of vlmrm's CLIP and VLMReward.
    Returns the poses after a third, two thirds and all of the tries (at least 3), float32
    (3, climbers, 24). Poses that are held out earn -1.
    """
    body, kept = Body(), []
    arms, clip = arm_library(body, rng), vlmrm.CLIP(model)
    reward_fn = vlmrm.VLMReward(clip, prompt, vlmrm.BASELINE_PROMPT, alpha)
    scene = vlmrm.Scene(clip.size)

    def reward(states):
        forbidden = held_out(vlmrm.measure_states(body.model, states))
        return np.where(forbidden, -1, reward_fn(vlmrm.render_states(scene, states)))

    states = np.array([random_pose(body, arms, rng) for _ in range(5 * climbers)])
    rewards = reward(states)
    best = np.argsort(rewards)[-climbers:]
    states, rewards = states[best], rewards[best]
    for i in range(1, tries + 1):
        others = np.array([changed(body, arms, qpos, rng) for qpos in states])
        earned = reward(others)
        better = earned > rewards
        states[better], rewards[better] = others[better], earned[better]
        if i in (tries // 3, 2 * tries // 3, tries):
            kept.append(states.astype(np.float32))
    return np.array(kept)


def changed(body: Body, arms: np.ndarray, qpos: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """A pose (24,) with one thing changed, on the floor; qpos itself stays.

    Some joints a little, one arm or leg more, both arms, or how it is turned.
    """
    qpos, kind = qpos.copy(), rng.random()
    if kind < 0.5:
        some = rng.random(17) < 0.4
        qpos[7:] += np.deg2rad(rng.choice([2, 5, 12])) * rng.standard_normal(17) * some
    elif kind < 0.75:
        limbs = body.legs[:4], body.legs[4:], body.arms[:3], body.arms[3:]
        limb = limbs[rng.integers(4)]
        qpos[limb] += np.deg2rad(rng.choice([5, 15])) * rng.standard_normal(len(limb))
    elif kind < 0.85:
        qpos[body.arms] = arms[rng.integers(len(arms))]
    else:
        angles = np.deg2rad(rng.choice([3, 10]) * rng.standard_normal(3))
        orientation = turned(quaternion(*angles), qpos[3:7])
        qpos[3:7] = orientation / np.linalg.norm(orientation)
    return body.ground(qpos, 0.005)


def climbed_states(prompt: str, seed: int, folder: Path) -> np.ndarray:
    """The poses of a climb on the CLIP in `folder`, and what lies around its end, (n, 24)."""
    torch.set_num_threads(1)
    rng = np.random.default_rng(seed)
    kept = climb(prompt, rng, f"local-dir:{folder}")
    return np.concatenate([*kept, around(Body(), kept[-1], rng)])


def visited_states(prompt: str, seed: int, steps: int, folder: Path) -> np.ndarray:
    """Trains SAC on the reward of the CLIP in `folder` for a prompt, for so many steps.

    Returns all states that it met, in order, float32 (N, 24).
    """
    torch.set_num_threads(1)
    visited = []

    class Recorder(vlmrm.Humanoid):
        def step(self, action):
            result = super().step(action)
            visited.append(self.data.qpos.astype(np.float32))
            return result

    clip = vlmrm.CLIP(f"local-dir:{folder}")
    reward_fn, scene = vlmrm.VLMReward(clip, prompt, vlmrm.BASELINE_PROMPT), vlmrm.Scene(clip.size)

    def make_env():
        return gymnasium.wrappers.TimeLimit(Recorder(scene), 100)

    envs, eval_envs = (
        gymnasium.vector.SyncVectorEnv([make_env] * 16, autoreset_mode="Disabled") for _ in range(2)
    )
    config = sac.Config(steps=steps, seed=seed)
    agent = sac.SAC(envs.single_observation_space, envs.single_action_space, config)
    rows = sac.train(agent, envs, eval_envs, reward_fn)
    best = max(row.get("eval_reward", 0) for row in rows)
    print(f"  {prompt}: best reward {best:.3f}", flush=True)
    return np.array(visited)


def on_policy_states(prompt: str, seed: int, steps: int, keep: int, folder: Path) -> np.ndarray:
    """`keep` visited_states, later ones more often, and what lies around the late ones, (n, 24)."""
    visited = visited_states(prompt, seed, steps, folder)
    rng, body = np.random.default_rng(seed), Body()
    weight = np.linspace(0.2, 1, len(visited))
    kept = visited[rng.choice(len(visited), keep, replace=False, p=weight / weight.sum())]
    late = visited[-len(visited) // 3 :]
    some = late[rng.integers(len(late), size=keep // 8)]
    return np.concatenate([kept, around(body, some, rng)])


def played_states(run: Path, keep: int = 100) -> np.ndarray:
    """`keep` states (keep, 24) from 16 episodes of the policy of a finished run.

    Half of the episodes explore, half are deterministic.
    """
    envs = vlmrm.make_envs(vlmrm.Scene(), count=16)
    hidden = json.loads((run / "config.json").read_text())["hidden"]
    config = sac.Config(hidden=hidden)
    agent = sac.SAC(envs.single_observation_space, envs.single_action_space, config)
    agent.load_state_dict(torch.load(run / "policy.pt", "cpu", weights_only=True))
    rng, states = np.random.default_rng(0), []

    def act(obs):
        states.extend(env.unwrapped.data.qpos.astype(np.float32) for env in envs.envs)
        return np.concatenate([agent.act(obs)[:8], agent.deterministic_action(obs)[8:]])

    sac.rollout(envs, act, 100, None, seed=5 * 10**9)
    return np.array(states)[rng.choice(len(states), keep, replace=False)]


def in_parallel(function: Callable, jobs: list[tuple], processes: int = 2) -> list:
    """function(*job) for each job, in fresh processes; the results in the order of the jobs.

    Fresh, because a forked one would inherit a renderer that it cannot use. The function is found
    there by its module's name.
    """
    with multiprocessing.get_context("spawn").Pool(processes) as pool:
        return pool.starmap(function, jobs, chunksize=1)
