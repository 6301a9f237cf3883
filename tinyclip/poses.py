"""Poses of a body, and where they lead: scripts for the joints, settling, random motors.

    scripts     joint angles for poses with a name: blended, mixed, jittered, leaning, random arms
    settling    gravity acts on a pose that weak motors try to hold
    motors      random ones move the body

Everything works on the model of any body that has the joints of Gymnasium's humanoid. No success
rule is used here, and no policy.

A state is MuJoCo's qpos (24,): the root's position in metres (3), its quaternion (4), and 17 joint
angles in radians.
"""

import multiprocessing
from collections.abc import Callable, Iterator
from typing import NamedTuple

import vlmrm  # noqa: F401  before mujoco: it chooses how to draw
import mujoco
import numpy as np

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
    # What the prompts name is more often there. Stand, squat, bow
    *[Script((0, 0, 0, -2))] * 25,
    Script((0, 0, -35, -60), abdomen=-10),
    Script((-5, -25, -95, -125), abdomen=-30, pitch=15),
    Script((-10, -40, -105, -150), abdomen=-40, pitch=15),
    Script((0, 0, -40, -5), abdomen=-50, pitch=20),
    Script((-20, 0, 0, -2)),
    # one leg
    *[
        Script((0, 0, 0, -2), (0, 0, -60, -80)),
        Script((0, 0, 0, -2), (0, 0, -60, -5)),
        Script((0, 0, 0, -2), (-25, -10, -20, -10)),
        Script((0, 0, 0, -2), (0, 0, 5, -110)),
        Script((0, 0, 0, -2), (-25, -55, -60, -130)),
        Script((0, 0, 0, -2), (0, 0, -25, -60)),
    ]
    * 2,
    # kneel
    *[
        Script((0, 0, 0, -90)),
        Script((-20, -10, 0, -90)),
        Script((0, 0, -15, -110)),
        Script((0, 0, -60, -150)),
        Script((-5, -15, -70, -158)),
        Script((0, 0, -50, -140), abdomen=-60, pitch=30),
    ]
    * 8,
    # one knee, all fours
    Script((0, 0, 0, -95), (0, 0, -90, -90)),
    Script((0, 0, 15, -60), (0, 0, -80, -80)),
    Script((0, 0, -90, -90), abdomen=-5, pitch=85),
    Script((0, 0, -60, -90), (0, 0, -100, -90), abdomen=-10, pitch=80),
    # lotus
    *[
        Script((-10, -48, -30, -158), abdomen=-30),
        Script((-15, -55, -85, -155), abdomen=20, pitch=15),
        Script((-5, -55, -60, -155)),
        Script((-17, -50, -95, -158), abdomen=22, pitch=20),
        Script((0, -52, -24, -158), abdomen=-18, pitch=-30),
        Script((-4, -57, -28, -157), abdomen=-50),
    ]
    * 5,
    # sit
    Script((0, 0, -85, -5)),
    Script((0, 0, -100, -70)),
    Script((0, 0, -110, -130), abdomen=-20, pitch=-10),
    # splits (few stay so), straddle, half of the splits
    *[
        Script((-25, -60, -80, -2)),
        Script((-25, -58, -70, -4), abdomen=-10),
        Script((-15, -35, -85, -5)),
    ]
    * 5,
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
    # geom 0 is the floor. Each of the others reaches down from its centre, by its sizes and by how
    # far its own axes point up or down
    kind, size = model.geom_type[1:], model.geom_size[1:]
    down = np.abs(data.geom_xmat[1:, 6:])  # (geoms, 3 axes)
    radius, half_length = size[:, 0], down[:, 2] * size[:, 1]  # of spheres, capsules, cylinders
    reaches = {
        mujoco.mjtGeom.mjGEOM_SPHERE: radius,
        mujoco.mjtGeom.mjGEOM_CAPSULE: radius + half_length,
        mujoco.mjtGeom.mjGEOM_CYLINDER: radius * np.sqrt(1 - down[:, 2].clip(0, 1) ** 2)
        + half_length,
        mujoco.mjtGeom.mjGEOM_BOX: (down * size).sum(1),
        mujoco.mjtGeom.mjGEOM_ELLIPSOID: np.linalg.norm(down * size, axis=1),
    }
    reach = np.select([kind == shape for shape in reaches], list(reaches.values()))
    return float((data.geom_xpos[1:, 2] - reach).min())


class Simulator:
    """Puts a body into poses and lets go of it.

    low, high: limits of the 17 joints, in radians. legs, hips, arms, abdomen, waist: where in
    qpos their joints are, left before right. qpos[7:] are the joints, in the order of low and high.
    """

    def __init__(self, model: mujoco.MjModel):
        self.model, self.data = model, mujoco.MjData(model)
        self.low, self.high = self.model.jnt_range[1:].T  # joint 0 is the root, which is free
        joints = [self.model.joint(j) for j in range(1, self.model.njnt)]
        address = {joint.name: joint.qposadr[0] for joint in joints}
        self.legs = [address[name] for name in LEG_JOINTS]
        self.hips = [self.legs[2], self.legs[6]]  # how far each leg is drawn up
        self.arms = [address[name] for name in ARM_JOINTS]
        self.abdomen = address["abdomen_y"]
        self.waist = [address["abdomen_x"], address["abdomen_z"]]
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

    def settle(
        self, qpos: np.ndarray, stiffness: float, snapshots, push: np.ndarray | float = 0
    ) -> list[np.ndarray]:
        """Lets gravity act while motors (stiffness: N m/rad) try to hold the pose qpos (24,).

        push: the speed at which the root begins, (6,) in m/s and rad/s. Returns the states after
        each number of steps of 15 ms in `snapshots`, which ascends.
        """
        mujoco.mj_resetData(self.model, self.data)
        self.data.qpos[:], self.data.qvel[:6] = qpos, push
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

    def move(self, qpos: np.ndarray, snapshots, rng: np.random.Generator) -> list[np.ndarray]:
        """Random motors, each smoothly over time, move the pose qpos (24,). Returns as `settle`."""
        mujoco.mj_resetData(self.model, self.data)
        self.data.qpos[:] = qpos
        action, memory, states = np.zeros(17), rng.choice([0, 0.8, 0.95]), []
        for i in range(max(snapshots) + 1):
            if i in snapshots:
                states.append(self.data.qpos.copy())
            action = memory * action + np.sqrt(1 - memory**2) * rng.uniform(-0.7, 0.7, 17)
            self.data.ctrl[:] = np.clip(action, -0.4, 0.4)
            mujoco.mj_step(self.model, self.data, nstep=5)
        return states


# --------------------------------------------------------------------------------------------------
# Poses and states of a body


def random_arms(sim: Simulator, rng: np.random.Generator, count: int) -> np.ndarray:
    """Angles of both arms in radians, (count, 6); in most, one is the other's mirror image."""
    low, high = sim.limits(sim.arms)
    angles = rng.uniform(low, high, (count, 6))
    alike = rng.random(count) < 0.7
    noise = rng.normal(0, 0.1, (alike.sum(), 3))
    angles[alike, 3:] = angles[alike, :3] * [-1, -1, 1] + noise
    return np.clip(angles, low, high)


def random_pose(sim: Simulator, arms: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """A pose near the floor, qpos (24,), with arms of `arms` (n, 6), in radians.

    Scripted, between two scripts, each leg from another, or random; then leaning, jittered, turned.
    """
    qpos, kind = sim.scripted(rng), rng.random()
    if kind < 0.20:
        t = rng.random()
        qpos = (1 - t) * qpos + t * sim.scripted(rng)
    elif kind < 0.36:
        qpos[sim.legs[4:]] = sim.scripted(rng)[sim.legs[4:]]
    elif kind < 0.42:
        qpos[7:] = rng.uniform(sim.low, sim.high)
    if rng.random() < 0.2:  # policies like to twist
        qpos[sim.waist] = rng.uniform(sim.low, sim.high)[np.array(sim.waist) - 7]
    if rng.random() < 0.25:  # and to lean: the waist makes up for it, or else the hips
        angle, (low, high) = np.deg2rad(rng.uniform(-80, 60)), sim.limits([sim.abdomen])
        bend = np.clip(qpos[sim.abdomen] - angle, low[0], high[0]) - qpos[sim.abdomen]
        qpos[sim.abdomen] += bend
        qpos[sim.hips] -= angle + bend
        qpos[3:7] = turned(quaternion(0, angle, 0), qpos[3:7] / np.linalg.norm(qpos[3:7]))
    qpos[7:] += np.deg2rad(rng.choice([2, 6, 12])) * rng.standard_normal(17)
    qpos[sim.arms] = arms[rng.integers(len(arms))]
    if rng.random() < 0.15:  # each arm from another
        qpos[sim.arms[3:]] = arms[rng.integers(len(arms)), 3:]
    qpos[sim.arms] += np.deg2rad(rng.choice([2, 5, 15])) * rng.standard_normal(6)
    yaw = rng.normal(0, 0.35) if rng.random() < 0.8 else rng.uniform(-np.pi, np.pi)
    tilt = np.deg2rad(rng.choice([3, 8, 25], p=[0.5, 0.35, 0.15]) * rng.standard_normal(2))
    qpos[3:7] = turned(quaternion(yaw, *tilt), qpos[3:7] / np.linalg.norm(qpos[3:7]))
    return sim.ground(qpos, 0.01 if rng.random() < 0.93 else rng.uniform(0, 0.5))


def random_states(
    sim: Simulator, arms: np.ndarray, rng: np.random.Generator, count: int
) -> np.ndarray:
    """States of a body, (count, 24): 59% poses, 30% on their way down, 10% moved by motors."""
    states = []
    while len(states) < count:
        qpos, kind = random_pose(sim, arms, rng), rng.random()
        snapshots = np.sort(rng.choice(np.arange(2, 60), 5, replace=False))
        if kind < 0.88:
            states.append(qpos)
        elif kind < 0.97:
            push = rng.normal(0, rng.choice([0, 1]), 6)
            states += sim.settle(qpos, rng.choice([0, 20, 60, 150, 300, 600]), snapshots, push)
        else:
            start = qpos if rng.random() < 0.5 else sim.model.qpos0
            states += sim.move(start, snapshots, rng)
    return np.array(states[:count])


def changed(
    sim: Simulator, arms: np.ndarray, qpos: np.ndarray, rng: np.random.Generator
) -> np.ndarray:
    """A pose (24,), changed in one of four ways; qpos itself stays.

    Some joints a little; one arm or leg more; both arms, to some of `arms` (n, 6); or it is turned.
    Then its lowest point is 5 mm above the floor.
    """
    qpos, kind = qpos.copy(), rng.random()
    if kind < 0.5:
        some = rng.random(17) < 0.4
        qpos[7:] += np.deg2rad(rng.choice([2, 5, 12])) * rng.standard_normal(17) * some
    elif kind < 0.75:
        limbs = sim.legs[:4], sim.legs[4:], sim.arms[:3], sim.arms[3:]
        limb = limbs[rng.integers(4)]
        qpos[limb] += np.deg2rad(rng.choice([5, 15])) * rng.standard_normal(len(limb))
    elif kind < 0.85:
        qpos[sim.arms] = arms[rng.integers(len(arms))]
    else:
        angles = np.deg2rad(rng.choice([3, 10]) * rng.standard_normal(3))
        orientation = turned(quaternion(*angles), qpos[3:7])
        qpos[3:7] = orientation / np.linalg.norm(orientation)
    return sim.ground(qpos, 0.005)


def in_parallel(function: Callable, jobs: list[tuple], processes: int = 2) -> Iterator:
    """function(*job) for each job, in fresh processes; yields results in the order of the jobs.

    Fresh, because a forked one would inherit a renderer that it cannot use. The function is found
    there by its module's name.
    """
    with multiprocessing.get_context("spawn").Pool(processes) as pool:
        results = [pool.apply_async(function, job) for job in jobs]
        for result in results:
            yield result.get()
