"""Bodies, scenes and cameras at random: what the embedded CLIP sees instead of this robot.

Each body is made from Gymnasium's humanoid: the same joints, but limbs of other lengths and
thickness, other shapes and other colours, on another floor under another sky. Around the robot that
CLIP will judge, a margin is kept free: no body has nearly its proportions (PROPORTION_MARGIN), and
no part of a body nearly one of its colours (COLOUR_MARGIN). `margins` measures both.
"""

from typing import NamedTuple

import vlmrm  # before mujoco: it chooses how to draw
import mujoco
import numpy as np
from tinyclip.poses import lowest_point

# Each proportion is a factor: 1 is Gymnasium's humanoid. The least and the most of each
RANGES = dict(
    size=(0.88, 1.12),  # of the whole, on top of all others
    thigh=(0.86, 1.16),  # lengths
    shin=(0.86, 1.16),
    upper_arm=(0.86, 1.16),
    forearm=(0.86, 1.16),
    torso=(0.86, 1.16),
    shoulders=(0.85, 1.3),  # widths
    hips=(0.85, 1.35),
    legs=(0.75, 1.3),  # thickness
    arms=(0.75, 1.6),
    trunk=(0.8, 1.4),
    head=(0.8, 1.4),  # radii
    hands=(0.8, 1.7),
    feet=(0.8, 1.3),
)
NEAR = dict(torso=(0.93, 1.08))  # of the second lesson's new bodies (make.py), instead
# Cameras are at random around the paper's: by azimuth (standard deviation) and elevation, in
# degrees; by distance and height, in metres times the body's size
VIEW = 18, (-9, 7), (-0.5, 0.7), (-0.13, 0.13)
NEAR_VIEW = 10, (-4, 4), (-0.3, 0.3), (-0.06, 0.06)  # of the second lesson's new bodies
PROPORTION_MARGIN = 0.05  # at least one proportion is further from 1 than this
# Which factor thickens which part
THICKNESS = dict.fromkeys(["torso1", "uwaist", "lwaist", "butt"], "trunk")
THICKNESS |= dict(thigh1="legs", shin1="legs", uarm1="arms", larm="arms")
THICKNESS |= dict(head="head", foot="feet", hand="hands")
ROUND = "head", "foot", "hand"  # the other parts are long
ROUND_SHAPES = "sphere", "ellipsoid", "box"  # the first is the robot's
LONG_SHAPES = "capsule", "ellipsoid", "box", "cylinder"

GYMNASIUM = [(0.8, 0.6, 0.4)]  # the humanoid before vlmrm.paint
COLOURS = np.array(GYMNASIUM + [c[:3] for c in (vlmrm.PALE, vlmrm.DARK, vlmrm.ORANGE)])
COLOUR_MARGIN = 0.12  # distance from each of COLOURS, of red, green, blue in [0, 1]
LOOKS = 8  # ways in which a body is painted


class Body(NamedTuple):
    """A body as it is drawn by chance; `build` makes it."""

    proportions: dict[str, float]  # of each in RANGES, a factor
    shapes: dict[str, str]  # of each part in THICKNESS, the name of a MuJoCo geom
    colours: np.ndarray  # (LOOKS, parts, 3), red, green, blue in [0, 1]
    near: bool = False  # is it one of the second lesson's new bodies?


def random_body(rng: np.random.Generator, near: bool = False) -> Body:
    """Any body outside of the margin around Gymnasium's humanoid."""
    ranges = RANGES | NEAR if near else RANGES
    while True:
        proportions = {name: rng.uniform(*limits) for name, limits in ranges.items()}
        if proportion_margin(proportions) > PROPORTION_MARGIN:
            break
    shapes = {}
    for part in THICKNESS:
        kinds = ROUND_SHAPES if part in ROUND else LONG_SHAPES
        shapes[part] = kinds[0] if rng.random() < 0.4 else str(rng.choice(kinds))
    return Body(proportions, shapes, np.array([random_paint(rng) for _ in range(LOOKS)]), near)


def random_paint(rng: np.random.Generator) -> np.ndarray:
    """A colour for each part in THICKNESS, (parts, 3): shades of one, or of three."""
    hues = rng.random((1 if rng.random() < 0.2 else 3, 3))
    paint = []
    while len(paint) < len(THICKNESS):
        colour = np.clip(hues[rng.integers(len(hues))] + rng.uniform(-0.12, 0.12, 3), 0, 1)
        if colour_margin(colour) > COLOUR_MARGIN:
            paint.append(colour)
        elif rng.random() < 0.1:  # a hue that is too near the robot's
            hues = rng.random(hues.shape)
    return np.array(paint)


def proportion_margin(proportions: dict[str, float]) -> float:
    """By how much the proportion differs that differs most from Gymnasium's humanoid.

    The size is none: cameras keep a distance that goes with it, so that it is hardly seen.
    """
    return max(abs(factor - 1) for name, factor in proportions.items() if name != "size")


def colour_margin(colours: np.ndarray) -> float:
    """How far the nearest of colours (..., 3) is from one of the robot's."""
    return float(np.linalg.norm(colours[..., None, :] - COLOURS, axis=-1).min())


def body_rng(seed: int, number: int) -> np.random.Generator:
    """What body `number` of a training with this seed is made with."""
    return np.random.default_rng([seed, number])


def margins(seed: int, count: int, near: bool = False) -> tuple[float, float]:
    """Over all bodies of a lesson: the least proportion_margin, and the least colour_margin."""
    bodies = [random_body(body_rng(seed, i), near) for i in range(count)]
    proportion = min(proportion_margin(body.proportions) for body in bodies)
    return proportion, min(colour_margin(body.colours) for body in bodies)


# --------------------------------------------------------------------------------------------------
# From a body to MuJoCo's model of it


def build(body: Body, rng: np.random.Generator, size: int) -> mujoco.MjModel:
    """The body in a random scene, for frames of size x size pixels."""
    spec = mujoco.MjSpec.from_file(str(vlmrm.HUMANOID))
    vlmrm.paint(spec)
    vlmrm.simplify(spec)
    furnish(spec, rng)
    spec.visual.global_.offheight = spec.visual.global_.offwidth = size
    spec.visual.quality.shadowsize = 0  # a renderer opens ten times as fast
    spec.option.integrator = mujoco.mjtIntegrator.mjINT_IMPLICITFAST  # a fourth of RK4's work
    p = body.proportions
    factors = stretches(p)
    for part in spec.bodies:
        part.pos = np.array(part.pos) * factors.get(common(part.name), 1) * p["size"]
    for joint in spec.joints:
        joint.pos = np.array(joint.pos) * p["size"]
    for geom in spec.geoms:
        name = common(geom.name)
        if name == "floor":
            continue
        by = np.array(factors.get(name, (1, 1, 1))) * p["size"]
        radius = geom.size[0] * p[THICKNESS[name]] * p["size"]
        if name in ROUND:
            geom.pos = np.array(geom.pos) * by
        else:
            geom.fromto = np.array(geom.fromto) * np.tile(by, 2)  # its two ends
        shape = body.shapes[name]
        geom.type = getattr(mujoco.mjtGeom, f"mjGEOM_{shape.upper()}")
        # half of the width, along both axes; of what lies between two ends, MuJoCo finds the length
        half = radius * dict(box=0.83, ellipsoid=1.05).get(shape, 1)
        geom.size = [half, half, half if name in ROUND else 0]
    return spec.compile()


def common(name: str) -> str:
    """A part's name without its side."""
    return name.removeprefix("left_").removeprefix("right_")


def stretches(p: dict[str, float]) -> dict[str, tuple]:
    """By what the places of bodies and geoms grow along x (forward), y (left) and z (up)."""
    upper_arm, forearm = (p["upper_arm"],) * 3, (p["forearm"],) * 3  # they point aslant
    return dict(
        torso1=(1, p["shoulders"], 1),
        uwaist=(1, p["shoulders"], p["torso"]),
        head=(1, 1, p["torso"]),
        lwaist=(1, p["hips"], p["torso"]),
        pelvis=(1, 1, p["torso"]),
        butt=(1, p["hips"], 1),
        thigh=(1, p["hips"], 1),  # where the thigh begins; next, where it ends
        thigh1=(1, 1, p["thigh"]),
        shin=(1, 1, p["thigh"]),
        shin1=(1, 1, p["shin"]),
        foot=(1, 1, p["shin"]),
        upper_arm=(1, p["shoulders"], p["torso"]),
        uarm1=upper_arm,
        lower_arm=upper_arm,
        larm=forearm,
        hand=forearm,
    )


def furnish(spec: mujoco.MjSpec, rng: np.random.Generator):
    """A random floor, sky and light."""

    def about(colour, spread):
        return np.clip(colour + rng.uniform(-spread, spread, 3), 0, 1)

    for texture in spec.textures:
        if texture.type == mujoco.mjtTexture.mjTEXTURE_SKYBOX:
            texture.rgb1, texture.rgb2 = rng.uniform(0.15, 1, (2, 3))
        elif texture.name == "texplane":
            colour = rng.uniform(0.1, 0.9, 3)
            texture.rgb1, texture.rgb2 = colour, about(colour, 0.25)
            edge = mujoco.mjtMark.mjMARK_EDGE, mujoco.mjtMark.mjMARK_NONE
            texture.mark, texture.markrgb = edge[rng.integers(2)], about(colour, 0.2)
    spec.material("MatPlane").texrepeat = [rng.uniform(4, 25)] * 2
    light = spec.lights[0]
    light.dir = (*rng.uniform(-0.8, 0.8, 2), -1)
    light.diffuse, light.ambient = (rng.uniform(0.45, 0.9),) * 3, (rng.uniform(0.1, 0.4),) * 3


def own_metre(model: mujoco.MjModel) -> float:
    """How high the pelvis of a standing body is, where the robot's is 1: the body's own measure."""
    data = mujoco.MjData(model)
    lowest = lowest_point(model, data)  # standing straight, as MuJoCo begins
    return float(data.body("pelvis").xpos[2] - lowest) / 0.868


def measure(model: mujoco.MjModel, states: np.ndarray) -> vlmrm.Pose:
    """vlmrm.measure_states of qpos (N, 24), with all lengths in the body's own measure."""
    metre, pose = own_metre(model), vlmrm.measure_states(model, states)
    directions = dict(up=pose.up, facing=pose.facing)
    return vlmrm.Pose(*(places / metre for places in pose))._replace(**directions)


def usual_camera(body: Body) -> mujoco.MjvCamera:
    """Where the paper's camera is, as far off as the body is large."""
    return placed(body, 0, 0, 0, 0)


def random_camera(body: Body, rng: np.random.Generator) -> mujoco.MjvCamera:
    """Around that place."""
    azimuth, *limits = NEAR_VIEW if body.near else VIEW
    return placed(body, rng.normal(0, azimuth), *(rng.uniform(*pair) for pair in limits))


def placed(
    body: Body, azimuth: float, elevation: float, distance: float, height: float
) -> mujoco.MjvCamera:
    """The paper's camera, moved by these degrees, and by these metres times the body's size."""
    camera, usual, size = mujoco.MjvCamera(), vlmrm.CAMERA, body.proportions["size"]
    camera.azimuth = usual["azimuth"] + azimuth
    camera.elevation = usual["elevation"] + elevation
    camera.distance = (usual["distance"] + distance) * size
    camera.lookat[2] = (usual["lookat"][2] + height) * size
    return camera


class Painter:
    """Draws a body's states: frames, uint8 (N, size, size, 3), of qpos (N, 24).

    Frame i is painted in look i of the body's LOOKS, and then the first again. It is seen by the
    camera given, which follows the body, or each by another one.
    """

    def __init__(self, body: Body, model: mujoco.MjModel):
        self.body, self.model, self.data = body, model, mujoco.MjData(model)
        names = [common(model.geom(i).name) for i in range(1, model.ngeom)]
        self.parts = [list(THICKNESS).index(name) for name in names]
        self.size = model.vis.global_.offheight
        self.renderer = mujoco.Renderer(model, self.size, self.size)
        for flag in (mujoco.mjtRndFlag.mjRND_SHADOW, mujoco.mjtRndFlag.mjRND_REFLECTION):
            self.renderer.scene.flags[flag] = False

    def draw(
        self, states: np.ndarray, rng: np.random.Generator, camera: mujoco.MjvCamera | None = None
    ) -> np.ndarray:
        frames = np.empty((len(states), self.size, self.size, 3), np.uint8)
        for i, qpos in enumerate(states):
            self.model.geom_rgba[1:, :3] = self.body.colours[i % LOOKS][self.parts]
            self.data.qpos[:] = qpos
            mujoco.mj_kinematics(self.model, self.data)
            mujoco.mj_camlight(self.model, self.data)
            view = camera or random_camera(self.body, rng)
            view.lookat[:2] = qpos[:2]
            self.renderer.update_scene(self.data, view)
            frames[i] = self.renderer.render()
        return frames

    def close(self):
        self.renderer.close()
