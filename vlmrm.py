"""One sentence in, a trained humanoid out: vision-language models as zero-shot reward models for RL.

A reward function usually has to be programmed. Here it is a sentence: a frozen CLIP compares a rendered frame of a
robot, simulated in MuJoCo, with, say, "a humanoid robot kneeling", and that similarity, cleaned by the goal-baseline
projection, is the reward of the time step: R(s) = VLM(l, psi(s)), equation (1), for the description l of the task and
the picture psi(s) of the state s. sac.py learns from it. Here is all about the reward, in the order it is used:

    1. the reward        equations (2) and (3), pure functions of embeddings: copy them into your own code
    2. CLIP              frames and sentences to embeddings, for any open_clip model
    3. the scene         psi(s): what CLIP sees of the simulator's state
    4. the tasks         eight prompts, and for each an independent judge that reads the simulator, never CLIP
    5. the command line

    python vlmrm.py                          # kneeling, on any machine, with the small CLIP in tinyclip/
    python vlmrm.py train --task splits
    python vlmrm.py train "a humanoid robot kneeling" --model ViT-bigG-14/laion2b_s39b_b160k --alpha 0   # on a GPU
    python vlmrm.py train --help

The method is that of Rocamonde et al., "Vision-Language Models are Zero-Shot Reward Models for Reinforcement Learning",
ICLR 2024, arXiv:2310.12921. Numbers of equations, tables and sections are that paper's.
"""
import argparse
import csv
import difflib
import json
import os
import shutil
import sys
import time
from dataclasses import fields
from pathlib import Path
from typing import Callable, NamedTuple

if sys.platform == "linux" and not os.environ.get("DISPLAY"):
    os.environ.setdefault("MUJOCO_GL", "egl")  # no screen: draw off-screen. MuJoCo reads this when it is imported

import open_clip  # open_clip and torch before any renderer exists: the other order crashes in EGL
import torch
import torch.nn.functional as F

CANNOT_DRAW = "cannot draw. Install EGL (apt-get install libegl1 libgl1-mesa-dri), or set MUJOCO_GL to glfw or osmesa"
try:
    import mujoco
except Exception as error:  # MuJoCo loads the graphics library at once
    message = f"{CANNOT_DRAW} ({error})"
    raise SystemExit(f"error: {message}") if __name__ == "__main__" else ImportError(message)
import gymnasium
import numpy as np
from gymnasium.envs.mujoco.humanoid_v5 import HumanoidEnv
from PIL import Image
from tqdm import tqdm

import sac

# ----------------------------------------------------------------------------------------------------------------------
# 1. The reward. Pure functions of embeddings, torch alone. `state` is the embedding of the state's picture.


def clip_reward(state, goal):
    """Equation (2): the cosine between an image's embedding and the task description's.

    state (B, D), goal (D,), of any norm -> (B,) in [-1, 1].
    """
    return F.normalize(state, dim=-1) @ F.normalize(goal, dim=-1)


def goal_baseline_reward(state, goal, baseline, alpha):
    """Equation (3), Definition 1: the goal-baseline regularized CLIP reward.

    An image's embedding says much that has nothing to do with the task (floor, sky, style). What the task changes is
    the direction from a baseline sentence ("a humanoid robot") to the goal sentence ("a humanoid robot kneeling"). So
    the embedding is moved towards its projection on the line L through the two, before it is compared with the goal.

    state (B, D), goal (D,), baseline (D,), of any norm; alpha in [0, 1]: 0 is equation (2), 1 keeps only what lies
    along L. Returns (B,), at most 1. Raises ValueError for an alpha out of range, or if alpha > 0 and goal = baseline.
    """
    if not 0 <= alpha <= 1:
        raise ValueError(f"alpha is {alpha}; it has to lie in [0, 1]")
    s, g, b = (F.normalize(x, dim=-1) for x in (state, goal, baseline))
    if alpha == 0:
        return 1 - 0.5 * (s - g).square().sum(-1)  # = s.g, since both are unit vectors
    line = g - b  # (D,) the direction of L
    if line.norm() < 1e-6:
        raise ValueError("goal and baseline are the same: no line to project on. Change a prompt, or use alpha 0")
    proj = b + ((s - b) @ line / line.square().sum()).unsqueeze(-1) * line  # (B, D) proj_L s
    return 1 - 0.5 * (alpha * proj + (1 - alpha) * s - g).square().sum(-1)  # (B,)


# ----------------------------------------------------------------------------------------------------------------------
# 2. CLIP: two networks, one for pictures and one for sentences, trained together on captioned pictures until a picture
# and its caption lie close in one space. Here they are frozen: nothing below trains them.

EMBEDDED_CLIP = "local-dir:" + str(Path(__file__).parent / "tinyclip")


class CLIP:
    """Any open_clip model, with its own image preprocessing and its own tokenizer.

    model: "NAME/TAG" from open_clip.list_pretrained(), such as "ViT-B-32/laion2b_s34b_b79k" (downloaded once, cached),
    "hf-hub:REPO", or "local-dir:PATH", a folder with open_clip_config.json and weights. precision: fp32, or, to halve
    the memory of a big model, fp16 or bf16. Raises ValueError if there is no such model or no way to get it.
    """

    def __init__(self, model: str = EMBEDDED_CLIP, device: str = "cpu", precision: str = "fp32"):
        name, tag = model, None
        if model.startswith("local-dir:"):
            folder = Path(model.removeprefix("local-dir:"))
            if not (folder / "open_clip_config.json").is_file():
                raise ValueError(f"no open_clip model in {folder}: it holds no open_clip_config.json")
            if not any(file.suffix in (".safetensors", ".bin", ".pth") for file in folder.iterdir()):
                raise ValueError(f"no weights in {folder}: they should be a .safetensors, .bin or .pth file in it")
        elif not model.startswith("hf-hub:"):
            name, _, tag = model.partition("/")
            known = [f"{n}/{t}" for n, t in open_clip.list_pretrained()]
            if model not in known:
                near = difflib.get_close_matches(model, known, 3, 0.3)
                raise ValueError(f"open_clip knows no model {model!r}; nearest: {', '.join(near) or 'none'}")
        try:
            self.model = open_clip.create_model(name, tag, precision=precision, device=device, require_pretrained=True)
            self.tokenizer = open_clip.get_tokenizer(name)
        except Exception as error:  # a hub has many ways to be out of reach, each with an exception of its own
            raise ValueError(f"cannot load {model} ({' '.join(str(error).split())[:160]}). Without network, use "
                             "local-dir:PATH, or leave --model out for the embedded model") from error
        self.model.eval().requires_grad_(False).to(memory_format=torch.channels_last)  # faster convolutions
        self.device, self.name = device, model
        self.dtype = open_clip.get_input_dtype(precision) or torch.float32
        config = self.model.visual.preprocess_cfg
        size = config["size"]
        self.size = (size, size) if isinstance(size, int) else tuple(size)  # (h, w) in pixels
        self.resize_mode, self.interpolation = config["resize_mode"], config["interpolation"]
        self.mean, self.std = (torch.tensor(config[k], device=device).view(3, 1, 1) for k in ("mean", "std"))

    def preprocess(self, frames) -> torch.Tensor:
        """uint8 (B, H, W, 3) -> float (B, 3, h, w), as this model was trained to see them; one batch, on the device."""
        x = torch.as_tensor(frames, device=self.device).permute(0, 3, 1, 2).float()  # (B, 3, H, W) in 0..255
        (H, W), (h, w) = x.shape[-2:], self.size
        if (H, W) != (h, w):  # open_clip's transform for single Pillow images, to one grey level
            scale = {"shortest": max(h / H, w / W), "longest": min(h / H, w / W), "squash": None}[self.resize_mode]
            whole = int if self.resize_mode == "shortest" and h == w else round
            new = (h, w) if scale is None else (whole(H * scale + 1e-9), whole(W * scale + 1e-9))
            for size in (H, new[1]), new:  # along x, then along y, each to whole grey levels
                x = F.interpolate(x, size, mode=self.interpolation, antialias=True).round().clamp(0, 255)
            top, left = (round((n - m) / 2) if n > m else -((m - n) // 2) for n, m in zip(new, (h, w)))  # crop, or pad
            x = F.pad(x, (-left, w - new[1] + left, -top, h - new[0] + top))
        return ((x / 255 - self.mean) / self.std).to(self.dtype)

    @torch.inference_mode()
    def embed_images(self, frames, batch_size: int = 128) -> torch.Tensor:
        """uint8 frames (B, H, W, 3) -> unit vectors (B, D), fp32."""
        if frames.ndim != 4 or frames.shape[-1] != 3 or frames.dtype not in (np.uint8, torch.uint8):
            raise ValueError(f"frames are {frames.dtype} {tuple(frames.shape)}; they have to be uint8 (B, H, W, 3)")
        batches = (frames[i:i + batch_size] for i in range(0, len(frames), batch_size))
        return F.normalize(torch.cat([self.model.encode_image(self.preprocess(x)) for x in batches]).float(), dim=-1)

    @torch.inference_mode()
    def embed_text(self, prompts: str | list[str]) -> torch.Tensor:
        """One sentence, or several whose unit vectors are averaged -> a unit vector (D,), fp32."""
        prompts = [prompts] if isinstance(prompts, str) else list(prompts)
        if not prompts or not all(prompt.strip() for prompt in prompts):
            raise ValueError("an empty prompt: write a sentence, such as \"a humanoid robot kneeling\"")
        for prompt in prompts:  # what a longer context adds is only padding, unless this model's own cuts the prompt
            length = self.tokenizer([prompt]).shape[1]
            tail = self.tokenizer([prompt], context_length=4 * length)[0, length:]
            if (tail != tail[-1]).any():
                raise ValueError(f"the prompt exceeds the {length} tokens that this CLIP reads: {prompt[:40]}...")
        embeddings = self.model.encode_text(self.tokenizer(prompts).to(self.device))  # (number of prompts, D)
        return F.normalize(F.normalize(embeddings.float(), dim=-1).mean(0), dim=-1)


class VLMReward:
    """Equation (1): a function from frames psi(s) to rewards, for one task description.

    Called on uint8 frames (B, H, W, 3) it returns float32 rewards (B,). A prompt may be a list, to be averaged.
    """

    def __init__(self, clip: CLIP, goal_prompt, baseline_prompt="a humanoid robot", alpha: float = 0.5):
        self.clip, self.alpha = clip, alpha
        self.goal, self.baseline = clip.embed_text(goal_prompt), clip.embed_text(baseline_prompt)  # once for all
        goal_baseline_reward(self.goal[None], self.goal, self.baseline, alpha)  # a mistake fails now, not in an hour

    def __call__(self, frames) -> np.ndarray:
        state = self.clip.embed_images(frames)  # (B, D)
        return goal_baseline_reward(state, self.goal, self.baseline, self.alpha).cpu().numpy()


# ----------------------------------------------------------------------------------------------------------------------
# 3. The scene: psi(s), the frame that stands for state s. App. C.2: realistic textures, and a camera that shows height.

CAMERA = dict(distance=3.5, elevation=-10, azimuth=180)  # m, degrees; the paper's. It looks at (robot's x, y; 1.0 m)
SHELL, JOINT, ACCENT = (.86, .88, .90, 1), (.20, .22, .26, 1), (.93, .45, .13, 1)  # rgba
PAINT = {"torso1": SHELL, "head": SHELL, "uwaist": JOINT, "lwaist": JOINT, "butt": SHELL, "thigh1": JOINT,
         "shin1": SHELL, "foot": ACCENT, "uarm1": JOINT, "larm": SHELL, "hand": ACCENT}


class Scene:
    """Gymnasium's humanoid, repainted in memory, and a camera. Physics is untouched: even a small floor has no edge.

    size: (height, width) in pixels. look: "realistic", or "original" for Gymnasium's own colours. effects: shadows,
    reflections and smooth edges, for people: CLIP sees the pose without them, for a small part of the time.
    """

    def __init__(self, size=(96, 96), look: str = "realistic", camera: dict = CAMERA, effects: bool = False):
        spec = mujoco.MjSpec.from_file(str(Path(gymnasium.__file__).parent / "envs/mujoco/assets/humanoid.xml"))  # v5's
        floor, tiles = spec.geom("floor"), spec.material("MatPlane")
        if look == "realistic":
            for texture in spec.textures:
                if texture.type == mujoco.mjtTexture.mjTEXTURE_SKYBOX:
                    texture.rgb1, texture.rgb2 = (.75, .85, .95), (.30, .50, .75)
                elif texture.name == "texplane":
                    texture.rgb1, texture.rgb2 = (.55, .52, .48), (.62, .59, .55)
                    texture.mark, texture.markrgb = mujoco.mjtMark.mjMARK_EDGE, (.45, .42, .40)
            for geom in spec.geoms:
                if geom.name != "floor":
                    geom.material, geom.rgba = "", PAINT[geom.name.removeprefix("left_").removeprefix("right_")]
            floor.rgba, tiles.reflectance = (1, 1, 1, 1), .1
            light = spec.lights[0]
            light.dir, light.diffuse, light.ambient = (-.5, .3, -1), (.7, .7, .7), (.25, .25, .25)
        if not effects:  # what costs time: many samples a pixel, round shapes of many facets, a floor of many tiles
            spec.visual.quality.offsamples, spec.visual.quality.numslices, spec.visual.quality.numstacks = 0, 8, 6
            floor.size, tiles.texrepeat = (5, 5, .125), [repeat / 4 for repeat in tiles.texrepeat]
        spec.visual.global_.offheight, spec.visual.global_.offwidth = size
        self.model, self.size, self.effects, self.renderer = spec.compile(), size, effects, None
        self.camera = mujoco.MjvCamera()  # a free one: a tracking camera sinks with the robot, which hides its height
        for name, value in camera.items():
            setattr(self.camera, name, value)

    def render(self, data: mujoco.MjData) -> np.ndarray:
        """The frame of a state: uint8 (height, width, 3)."""
        if self.renderer is None:
            try:
                self.renderer = mujoco.Renderer(self.model, *self.size)
            except Exception as error:
                raise ValueError(f"{CANNOT_DRAW} ({' '.join(str(error).split())[:99]})") from error
            for flag in (mujoco.mjtRndFlag.mjRND_SHADOW, mujoco.mjtRndFlag.mjRND_REFLECTION):
                self.renderer.scene.flags[flag] = self.effects
        mujoco.mj_kinematics(self.model, data)  # a step leaves the positions of a moment before its state
        mujoco.mj_camlight(self.model, data)
        self.camera.lookat[:] = data.qpos[0], data.qpos[1], 1.0
        self.renderer.update_scene(data, self.camera)
        return self.renderer.render()


class Pose(NamedTuple):
    """Where the body is, in metres: x where the pelvis faces, y left, z up, from the floor under the pelvis.

    Pairs are (left, right). Leading dimensions (...) may hold many poses.
    """

    up: np.ndarray  # (..., 3) the torso's own upward axis: up[2] = 1 is upright, 0 lying, -1 head down
    facing: np.ndarray  # (..., 3) the torso's own forward axis: facing[2] = 1 is face up
    head: np.ndarray  # (..., 3)
    pelvis: np.ndarray  # (..., 3)
    shoulders: np.ndarray  # (..., 2, 3), and so the rest
    elbows: np.ndarray
    hands: np.ndarray
    hips: np.ndarray
    knees: np.ndarray
    feet: np.ndarray


def measure(model: mujoco.MjModel, data: mujoco.MjData) -> Pose:
    """The pose of the simulator's current state."""
    mujoco.mj_kinematics(model, data)
    torso, pelvis = (data.body(name).xmat.reshape(3, 3) for name in ("torso", "pelvis"))  # columns are axes
    left = pelvis[:2, 1] / max(np.linalg.norm(pelvis[:2, 1]), 1e-6)  # the pelvis' leftward axis, on the floor
    turn = np.array([[left[1], -left[0], 0], [left[0], left[1], 0], [0, 0, 1]])  # from the world to the robot
    origin = [*data.body("pelvis").xpos[:2], 0]

    def points(kind, *names):  # bodies begin at their joints
        return (np.array([kind(name).xpos for name in names]) - origin) @ turn.T

    return Pose(turn @ torso[:, 2], turn @ torso[:, 0], points(data.geom, "head")[0], points(data.body, "pelvis")[0],
                shoulders=points(data.body, "left_upper_arm", "right_upper_arm"),
                elbows=points(data.body, "left_lower_arm", "right_lower_arm"),
                hands=points(data.geom, "left_hand", "right_hand"),
                hips=points(data.body, "left_thigh", "right_thigh"),
                knees=points(data.body, "left_shin", "right_shin"),
                feet=points(data.geom, "left_foot", "right_foot"))


# ----------------------------------------------------------------------------------------------------------------------
# 4. The tasks of Tables 1-3: a prompt, and a judge in the place of the paper's person who watches videos: the paper's
# criterion in metres and degrees. It reads the simulator; neither training nor selection reads it.


X, Y, Z = 0, 1, 2  # standing, the pelvis is 0.87 m high, the head 1.48 m; radii: head 0.09, foot 0.075, knee 0.05 m
SIDES = np.array([1, -1])  # turns leftward metres of a (left, right) pair into outward metres


def upright(p):
    return p.up[..., Z] > 0.7  # the torso leans less than 45 degrees


def kneeling(p):
    """Both knees on the floor, shins behind them, upright; not sunk to a seat, nor in the lotus."""
    return (upright(p) & (p.knees[..., Z] < 0.11).all(-1) & (p.knees[..., X] - p.feet[..., X] > 0.15).all(-1)
            & (np.abs(p.knees[..., Y]) < 0.30).all(-1) & (p.pelvis[..., Z] > 0.22) & ~lotus(p))


def lotus(p):
    """Seated as low as these legs allow, both knees on the floor and turned out, both feet inwards of the knees."""
    out = p.knees[..., Y] * SIDES  # (..., 2)
    return (upright(p) & (p.pelvis[..., Z] < 0.32) & (p.knees[..., Z] < 0.16).all(-1)
            & (out > 0.18).all(-1) & (out - p.feet[..., Y] * SIDES > 0.05).all(-1) & (p.knees[..., X] > -0.05).all(-1)
            & (np.abs(p.feet[..., X]) < 0.30).all(-1))


def at_full_height(p):
    return (p.up[..., Z] > 0.8) & (p.pelvis[..., Z] > 0.80)


def standing(p):
    """On both feet, legs nearly straight, torso upright."""
    return at_full_height(p) & (p.feet[..., Z] < 0.13).all(-1)


def arms_raised(p):
    """Standing, both hands above the top of the head."""
    return standing(p) & (p.hands[..., Z] > p.head[..., Z, None] + 0.09).all(-1)


def splits(p):
    """On the floor, both legs straight along it and each more than 45 degrees to its own side, torso upright."""
    leg, thigh, shin = p.feet - p.hips, p.knees - p.hips, p.feet - p.knees
    lengths = np.linalg.norm(thigh, axis=-1) * np.linalg.norm(shin, axis=-1)
    straight = (thigh * shin).sum(-1) > 0.87 * lengths  # bent by less than 30 degrees
    return (upright(p) & (p.pelvis[..., Z] < 0.22) & straight.all(-1) & (p.feet[..., Z] < 0.25).all(-1)
            & (leg[..., Y] * SIDES > np.abs(leg[..., X])).all(-1))


def hands_on_hips(p):
    """Standing, each hand within 15 cm of its side of the pelvis and not hanging below it, elbows further out."""
    hip = p.pelvis[..., None, :] + np.array([[0, 0.2, 0], [0, -0.2, 0]])
    return (standing(p) & (np.linalg.norm(p.hands - hip, axis=-1) < 0.15).all(-1)
            & (p.hands[..., Z] > p.pelvis[..., Z, None] - 0.08).all(-1)
            & ((p.elbows - p.hands)[..., Y] * SIDES > 0).all(-1))


def one_leg(p):
    """One foot alone on the floor, the other at least 15 cm above it, and otherwise standing."""
    low, high = p.feet[..., Z].min(-1), p.feet[..., Z].max(-1)
    return at_full_height(p) & (low < 0.13) & (high - low > 0.15)


def arms_crossed(p):
    """Standing, forearms really crossed before the chest: each hand past the middle, and further than its elbow."""
    return (standing(p) & (p.hands[..., Y] * SIDES < -0.04).all(-1) & ((p.elbows - p.hands)[..., Y] * SIDES > 0).all(-1)
            & (p.hands[..., X] > 0.05).all(-1) & (p.hands[..., Z] < p.shoulders[..., Z] + 0.05).all(-1)
            & (p.hands[..., Z] > p.pelvis[..., Z, None] + 0.1).all(-1)
            & (np.abs(p.hands[..., 0, Z] - p.hands[..., 1, Z]) < 0.2))


BASELINE_PROMPT = "a humanoid robot"  # for all eight tasks
TASKS: dict[str, tuple[str, Callable[[Pose], np.ndarray]]] = {  # name: (goal prompt, success condition)
    "kneeling": ("a humanoid robot kneeling", kneeling),
    "lotus": ("a humanoid robot seated down, meditating in the lotus position", lotus),
    "standing": ("a humanoid robot standing up", standing),
    "arms-raised": ("a humanoid robot standing up, with both arms raised", arms_raised),
    "splits": ("a humanoid robot practicing gymnastics, doing the side splits", splits),
    "hands-on-hips": ("a humanoid robot standing up with hands on hips", hands_on_hips),
    "one-leg": ("a humanoid robot standing up on one leg", one_leg),
    "arms-crossed": ("a humanoid robot standing up, with its arms crossed", arms_crossed),
}


class Humanoid(HumanoidEnv):
    """Gymnasium's Humanoid-v5 in a Scene. No posture ends an episode. info["success"] is the task's condition."""

    def __init__(self, scene: Scene, condition: Callable | None = None):
        self.scene, self.condition = scene, condition
        super().__init__(terminate_when_unhealthy=False, render_mode="rgb_array")

    def _initialize_simulation(self):  # Gymnasium's hook for loading a model file
        return self.scene.model, mujoco.MjData(self.scene.model)

    def step(self, action):
        observation, reward, terminated, truncated, _ = super().step(action)
        success = {} if self.condition is None else {"success": bool(self.condition(measure(self.model, self.data)))}
        return observation, reward, terminated, truncated, success

    def render(self):
        return self.scene.render(self.data)


def make_envs(scene: Scene, condition=None, count: int = 16, episode_steps: int = 100) -> gymnasium.vector.VectorEnv:
    """`count` humanoids that share one scene. Episodes end by truncation after episode_steps; 100 are 1.5 seconds."""
    def make():
        return gymnasium.wrappers.TimeLimit(Humanoid(scene, condition), episode_steps)
    return gymnasium.vector.SyncVectorEnv([make] * count, autoreset_mode=gymnasium.vector.AutoresetMode.DISABLED)


def success_rates(success) -> tuple[float, float]:
    """Success at each step of some episodes, (episodes, steps) -> two shares of the episodes; NaN without a condition.

    The paper's rule: the condition holds in at least half of the steps. Beside it, the share of episodes in which it
    holds in each of the last 20 steps, which says whether the robot stays so.
    """
    if np.isnan(success).any():
        return float("nan"), float("nan")
    return float((success.mean(1) >= 0.5).mean()), float(success[:, -20:].all(1).mean())


# ----------------------------------------------------------------------------------------------------------------------
# 5. The command line


def plot_curve(rows: list[dict], prompt: str, path):
    """CLIP reward beside the independent success rate: where only the first rises, the policy hacks the reward."""
    from matplotlib.figure import Figure  # not pyplot, which would look for a display
    judged = [row for row in rows if "eval_reward" in row]
    figure = Figure(figsize=(7, 4), layout="constrained")
    left = figure.add_subplot(title=f'"{prompt}"', xlabel="environment steps", ylabel="mean CLIP reward of a step")
    right = left.twinx()
    right.set(ylabel="success rate, judged from the simulator", ylim=(-0.02, 1.02))
    for axis, key, style, label in ((left, "reward", "C0-", "CLIP reward while exploring"),
                                    (left, "eval_reward", "C0o-", "CLIP reward of the deterministic policy"),
                                    (right, "eval_success", "C1o-", "success (half of the steps)"),
                                    (right, "eval_success_held", "C1:", "success (held through the last 20)")):
        some = rows if key == "reward" else judged
        axis.plot([row["steps"] for row in some], [row[key] for row in some], style, ms=3, label=label,
                  alpha=0.3 if key == "reward" else 1)
    figure.legend(loc="outside lower center", ncols=2, fontsize="small")
    figure.savefig(path, dpi=120)


def record_video(act, camera: dict, look: str, path, steps: int = 100, episodes: int = 3, seed: int = 3 * 10**9):
    """A GIF of whole episodes at half of real speed: left from CLIP's camera, right from the robot's side."""
    side = camera | dict(azimuth=camera["azimuth"] - 65)
    views = [Scene((240, 240), look, view, effects=True) for view in (camera, side)]
    env, frames = Humanoid(views[0]), []
    for episode in range(episodes):
        obs, _ = env.reset(seed=seed + episode)
        for i in range(steps):
            if i % 3 == 0:
                frames.append(Image.fromarray(np.concatenate([view.render(env.data) for view in views], 1)))
            obs = env.step(env.action_space.high * act(obs[None])[0])[0]
    frames[0].save(path, save_all=True, append_images=frames[1:], duration=90, loop=0)  # 3 steps of 15 ms in 90 ms


COLUMNS = ["steps", "reward", "success", "success_held", "eval_reward", "eval_success", "eval_success_held",
           "critic_loss", "actor_loss", "temperature", "entropy"]


def train(args):
    """Trains one policy; see `python vlmrm.py train --help` for what it reads and leaves."""
    start, device = time.time(), args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    task = args.task or (next((t for t in TASKS if args.prompt == [TASKS[t][0]]), None) if args.prompt else "kneeling")
    prompt, condition = args.prompt or [TASKS[task][0]], TASKS[task][1] if task else None
    baseline = args.baseline or [BASELINE_PROMPT]
    name = task or "-".join("".join(c if c.isalnum() else " " for c in prompt[0].lower()).split())[:60]
    out = args.out or Path("runs") / f"{name}-seed{args.seed}"
    a_run = (out / "config.json").exists() and (out / "metrics.csv").exists()
    if out.is_file() or out.is_dir() and any(out.iterdir()) and not (args.overwrite and a_run):
        raise ValueError(f"{out} already holds a run or other files: name another folder by --out, or replace a run by "
                         "--overwrite")

    clip = CLIP(args.model, device, args.precision)
    reward_fn = VLMReward(clip, prompt, baseline, args.alpha)
    camera = dict(distance=args.distance, elevation=args.elevation, azimuth=args.azimuth)
    scene = Scene(clip.size, args.look, camera)
    scene.render(mujoco.MjData(scene.model))  # without OpenGL, fail now and not after the first round
    config = sac.Config(**{field.name: getattr(args, field.name) for field in fields(sac.Config)})
    envs, eval_envs = (make_envs(scene, condition, args.envs, config.round_steps) for _ in range(2))
    agent = sac.SAC(envs.single_observation_space, envs.single_action_space, config, device)

    def judge(act, reward_fn=None):  # on seeds that neither training nor selection uses
        return sac.evaluate(eval_envs, act, reward_fn, args.episodes, seed=2 * 10**9, episode_steps=config.round_steps)

    references, rng = {}, np.random.default_rng(args.seed)
    shape = envs.action_space.shape
    if condition:
        for name, act in (("zero action", lambda obs: np.zeros(shape)), ("untrained network", agent.best_action),
                          ("random policy", lambda obs: rng.uniform(-1, 1, shape))):
            half, held = success_rates(judge(act)[1])
            references[name] = dict(success=half, success_held=held)

    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    settings = {key: value for key, value in vars(args).items() if key not in ("command", "function", "overwrite")}
    settings |= dict(prompt=prompt, baseline=baseline, task=task, device=device, out=str(out))
    (out / "config.json").write_text(json.dumps(settings, indent=1) + "\n")
    print(f"Training {prompt} against {baseline}, alpha {args.alpha:g}, on {device}, into {out}/")
    rows = []
    with open(out / "metrics.csv", "w", newline="") as file, tqdm(total=config.steps, unit="step") as bar:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        for row in sac.train(agent, envs, eval_envs, reward_fn):
            for key in ("success", "eval_success"):
                if key in row:
                    row[key], row[key + "_held"] = success_rates(row[key])
            if row.pop("best", False):
                torch.save(agent.state_dict(), out / "policy.pt")
            rows.append(row)
            writer.writerow({key: f"{value:.8g}" for key, value in row.items()})
            file.flush()
            judged = f", success {row['success']:.0%}" if condition else ""
            bar.set_postfix_str(f"CLIP reward {row['reward']:.3f}{judged}")
            bar.update(row["steps"] - bar.n)

    rewards, success = judge(agent.best_action, reward_fn)
    half, held = success_rates(success) if condition else (None, None)
    plot_curve(rows, prompt[0], out / "curve.png")
    record_video(agent.best_action, camera, args.look, out / "video.gif", config.round_steps)
    result = dict(prompt=prompt, task=task, model=args.model, alpha=args.alpha, seed=args.seed, steps=row["steps"],
                  episodes=args.episodes, success=half, success_held=held, reward=float(rewards.mean()),
                  references=references, seconds=round(time.time() - start, 1))
    (out / "result.json").write_text(json.dumps(result, indent=1) + "\n")
    judged = f"Success {half:.0%}, held to the end {held:.0%}" if condition else "No success condition for this prompt"
    print(f"{judged}; CLIP reward {rewards.mean():.3f}; {args.episodes} episodes after {row['steps']:,} steps and "
          f"{result['seconds'] / 60:.1f} minutes. Watch {out}/video.gif and see {out}/curve.png")


def parser() -> argparse.ArgumentParser:
    class Formatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
        def _get_help_string(self, action):  # a default only where it tells something
            return super()._get_help_string(action) if type(action.default) in (int, float) else action.help

    main = argparse.ArgumentParser(prog="vlmrm.py", description="One sentence in, a trained humanoid out.", epilog=(
        "Without a command: train kneeling with the embedded CLIP. Each command has its own --help."))
    commands = main.add_subparsers(dest="command", metavar="COMMAND", required=True)
    command = commands.add_parser("train", usage="vlmrm.py train [PROMPT ...] [OPTIONS]", formatter_class=Formatter,
                                  help="train a policy on a sentence", description=(
        "Trains SAC on the humanoid, rewarded by CLIP for looking like a sentence, and leaves in runs/NAME/:\n"
        "  video.gif    the best policy, in three new episodes\n"
        "  curve.png    CLIP reward beside success, over training\n"
        "  result.json  success by two rules over 100 new episodes, and what zero, random and untrained actions reach\n"
        "  policy.pt    the best policy's weights; also metrics.csv and config.json"))
    command.set_defaults(function=train)
    group = command.add_argument_group("the task")
    group.add_argument("prompt", nargs="*", help="the goal in a sentence, or in several to be averaged")
    group.add_argument("--task", choices=TASKS,
                       help="one of the paper's: its prompt (unless you give another) and its success condition. "
                       "Without a prompt: kneeling")
    group.add_argument("--baseline", action="append", metavar="PROMPT",
                       help=f"the scene without the goal; several are averaged. Left out: {BASELINE_PROMPT}")
    group.add_argument("--alpha", type=float, default=0.5, help="strength of the projection, from 0 (plain CLIP) to 1")
    group = command.add_argument_group("the CLIP")
    group.add_argument("--model", default=EMBEDDED_CLIP, help="NAME/TAG from open_clip's list, hf-hub:REPO or "
                       "local-dir:PATH. Left out: the embedded one, trained on pictures of this robot, a stand-in and "
                       "not a zero-shot model")
    group.add_argument("--precision", choices=["fp32", "fp16", "bf16"], default="fp32",
                       help="of CLIP's weights. Left out: fp32")
    group.add_argument("--device", help="cpu, cuda, cuda:1, ... Left out: cuda where there is one")
    group = command.add_argument_group("the scene")
    group.add_argument("--look", choices=["realistic", "original"], default="realistic",
                       help="the colours; original is Gymnasium's own. Left out: realistic")
    group.add_argument("--distance", type=float, default=CAMERA["distance"], help="of the camera, in metres")
    group.add_argument("--elevation", type=float, default=CAMERA["elevation"], help="of its gaze, in degrees")
    group.add_argument("--azimuth", type=float, default=CAMERA["azimuth"], help="in degrees: 180 sees the front")
    group = command.add_argument_group("learning, by SAC")
    group.add_argument("--envs", type=int, default=16, help="environments that step together")
    for field in fields(sac.Config):
        flag = "--" + field.name.replace("_", "-")
        group.add_argument(flag, type=field.type, default=field.default, help=field.metadata["help"])
    group = command.add_argument_group("the output")
    group.add_argument("--episodes", type=int, default=100, help="episodes of the final judgement")
    group.add_argument("--out", type=Path, help="folder of the run; left out: runs/TASK-seedN")
    group.add_argument("--overwrite", action="store_true", help="replace a run that is already there")
    return main


def main(argv=None):
    argv = list(sys.argv[1:] if argv is None else argv)
    if not argv or (argv[0].startswith("-") and argv[0] not in ("-h", "--help")):
        argv.insert(0, "train")
    args = parser().parse_args(argv)
    try:
        args.function(args)
    except ValueError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
