"""One sentence in, a trained humanoid out: vision-language models as zero-shot reward models for RL.

A reward function usually has to be programmed. Here it is a sentence: a frozen CLIP compares a rendered frame of a
robot, simulated in MuJoCo, with, say, "a humanoid robot kneeling", and that similarity, cleaned by the goal-baseline
projection, is the reward of the time step: R(s) = VLM(l, psi(s)), equation (1), for the description l of the task and
the picture psi(s) of the state s. sac.py learns from it. This file holds what concerns the reward, in order of use:

    1. the reward        equations (2) and (3), pure functions of embeddings: copy them into your own code
    2. CLIP              frames and sentences to embeddings, for any open_clip model
    3. the scene         psi(s): what CLIP sees of the simulator's state
    4. the tasks         eight prompts, and for each an independent judge that reads the simulator, never CLIP
    5. judging           EPIC, equation (4): is a reward worth training on?
    6. training, and the command line

    python vlmrm.py                          # kneeling, on any machine, with the small CLIP in tinyclip/
    python vlmrm.py train --task splits
    python vlmrm.py train --model ViT-bigG-14/laion2b_s39b_b160k --alpha 0 --precision bf16    # the paper's, on a GPU
    python vlmrm.py evaluate                 # is a reward worth training on?
    python vlmrm.py train --help

The method is that of Rocamonde et al., "Vision-Language Models are Zero-Shot Reward Models for Reinforcement Learning",
ICLR 2024, arXiv:2310.12921. Numbers of equations, tables and sections are that paper's.
"""

import argparse
import csv
import difflib
import inspect
import itertools
import json
import os
import shutil
import sys
import textwrap
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import fields
from pathlib import Path
from typing import NamedTuple

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
    if __name__ == "__main__":
        raise SystemExit(f"error: {message}") from error
    raise ImportError(message) from error
import gymnasium
import numpy as np
from gymnasium.envs.mujoco.humanoid_v5 import HumanoidEnv
from matplotlib.figure import Figure  # not pyplot, which would look for a display
from PIL import Image
from torch import Tensor
from tqdm import tqdm

import sac

# ----------------------------------------------------------------------------------------------------------------------
# 1. The reward. Pure functions of embeddings, torch alone. `state` is the embedding of the state's picture.


def clip_reward(state: Tensor, goal: Tensor) -> Tensor:
    """Equation (2): the cosine between an image's embedding and the task description's. Equation (3) at alpha 0.

    state (B, D), goal (D,), of any norm -> (B,) in [-1, 1]. Raises ValueError for other shapes, types, or NaN.
    """
    check_embeddings(state, goal)
    return F.normalize(state, dim=-1) @ F.normalize(goal, dim=-1)


def goal_baseline_reward(state: Tensor, goal: Tensor, baseline: Tensor, alpha: float) -> Tensor:
    """Equation (3), Definition 1: the goal-baseline regularized CLIP reward.

    An image's embedding says much that has nothing to do with the task (floor, sky, style). What the task changes is
    the direction from a baseline sentence ("a humanoid robot") to the goal sentence ("a humanoid robot kneeling"). So
    the embedding is moved towards its projection on the line L through the two, and where it arrives, x, is compared
    with the goal by 1 - |x - g|^2 / 2, which for unit vectors is the cosine.

    state (B, D), goal (D,), baseline (D,), of any norm; alpha in [0, 1]: 0 is equation (2), 1 keeps only what lies
    along L. Returns (B,), at most 1. Raises ValueError for an alpha out of range, if alpha > 0 and goal = baseline, and
    for other shapes, types, or NaN.
    """
    if not isinstance(alpha, (int, float)) or not 0 <= alpha <= 1:
        raise ValueError(f"alpha is {alpha!r}; it has to be a number in [0, 1]")
    check_embeddings(state, goal, baseline)
    s, g, b = (F.normalize(x, dim=-1) for x in (state, goal, baseline))
    if alpha == 0:
        return 1 - 0.5 * (s - g).square().sum(-1)  # = s.g, since both are unit vectors; L may not even exist
    line = g - b  # (D,) the direction of L
    if line.norm() < 1e-6:
        raise ValueError("goal and baseline are the same: no line to project on. Change a prompt, or use alpha 0")
    proj = b + ((s - b) @ line / line.square().sum()).unsqueeze(-1) * line  # (B, D) proj_L s
    return 1 - 0.5 * (alpha * proj + (1 - alpha) * s - g).square().sum(-1)  # (B,)


def check_embeddings(state: Tensor, *sentences: Tensor):
    """Raises ValueError unless they are (B, D) and (D,) each, floats of one type, and have a direction."""
    every = state, *sentences
    kinds = ", ".join(f"{getattr(x, 'dtype', type(x).__name__)} {tuple(getattr(x, 'shape', ()))}" for x in every)
    alike = all(isinstance(x, Tensor) and x.is_floating_point() and x.dtype == state.dtype for x in every)
    if not alike or state.ndim != 2 or any(x.shape != state.shape[1:] for x in sentences):
        raise ValueError(f"embeddings are {kinds}; they have to be float tensors of one type, (B, D) and (D,)")
    if not all(((norm := x.norm(dim=-1)).isfinite() & (norm > 1e-12)).all() for x in every):
        raise ValueError(f"embeddings ({kinds}) are NaN, infinite or zero: fp16 may have overflowed, try fp32")


# ----------------------------------------------------------------------------------------------------------------------
# 2. CLIP: two networks, one for pictures and one for sentences, trained together on captioned pictures until a picture
# and its caption lie close in one space. Here they are frozen: nothing below trains them.

EMBEDDED_CLIP = "tinyclip"
PRECISIONS = "fp32", "fp16", "bf16"


def default_device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


class CLIP:
    """Any open_clip model, with its own image preprocessing and its own tokenizer.

    model: "NAME/TAG" from open_clip.list_pretrained(), such as "ViT-B-32/laion2b_s34b_b79k" (downloaded once, cached),
    "hf-hub:REPO", "local-dir:PATH", a folder with open_clip_config.json and weights, or "tinyclip", the one beside this
    file. device: left out, cuda where there is one. precision: fp32, or, to halve the memory of a big model, fp16 or
    bf16. Raises ValueError if there is no such model or no way to get it.
    """

    def __init__(self, model: str = EMBEDDED_CLIP, device: str | None = None, precision: str = "fp32"):
        if not isinstance(model, str) or precision not in PRECISIONS:
            wanted = f"the model is given by its name, the precision is one of {', '.join(PRECISIONS)}"
            raise ValueError(f"model is {model!r}, precision {precision!r}: {wanted}")
        device = device or default_device()
        name, tag = model, None
        if model == EMBEDDED_CLIP:
            name = f"local-dir:{Path(__file__).parent / EMBEDDED_CLIP}"
        if not name.startswith(("hf-hub:", "local-dir:")):
            name, _, tag = model.partition("/")
            known = [f"{n}/{t}" for n, t in open_clip.list_pretrained()]
            if model not in known:
                near = difflib.get_close_matches(model, known, 3, 0.3)
                raise ValueError(f"open_clip knows no model {model!r}; nearest: {', '.join(near) or 'none'}")
        try:
            torch.zeros(1, device=device)  # no such device? Say so before a download
            # the weights know their activation function; open_clip only warns where the architecture has another
            quick = bool(tag) and open_clip.get_pretrained_cfg(name, tag).get("quick_gelu", False)
            # open_clip's half precision keeps fp32 layers in a CoCa and a Hugging Face text tower: take "pure"
            config = open_clip.get_model_config(name) or {}
            left_out = "multimodal_cfg" in config or "hf_model_name" in config.get("text_cfg", {})
            if left_out and precision != "fp32":
                precision = "pure_" + precision
            settings = dict(precision=precision, device=device, force_quick_gelu=quick, require_pretrained=True)
            self.model = open_clip.create_model(name, tag, **settings)
            self.tokenizer = open_clip.get_tokenizer(name)
        except Exception as error:  # a hub has many ways to be out of reach, each with an exception of its own
            message = f"cannot load {model} on {device} ({textwrap.shorten(str(error), 160, placeholder='...')})"
            advice = "Are there such a device and model? A download that was cut off goes on if you try again. Without "
            raise ValueError(f"{message}. {advice}network, use local-dir:PATH, or the embedded model") from error
        self.model.eval().requires_grad_(False).to(memory_format=torch.channels_last)  # faster convolutions
        self.device = device
        self.dtype = open_clip.get_input_dtype(precision) or torch.float32
        config = self.model.visual.preprocess_cfg
        size = config["size"]
        self.size = (size, size) if isinstance(size, int) else tuple(size)  # (h, w) in pixels
        self.resize_mode, self.interpolation = config["resize_mode"], config["interpolation"]
        self.mean, self.std = (torch.tensor(config[k], device=device).view(3, 1, 1) for k in ("mean", "std"))

    def preprocess(self, frames: np.ndarray | Tensor) -> Tensor:
        """uint8 (B, H, W, 3) -> float (B, 3, h, w), as this model was trained to see them; one batch, on the device."""
        if isinstance(frames, np.ndarray):
            frames = np.ascontiguousarray(frames)  # some renderers flip frames by a negative stride
        x = torch.as_tensor(frames, device=self.device).permute(0, 3, 1, 2).float()  # (B, 3, H, W) in 0..255
        (H, W), (h, w) = x.shape[-2:], self.size
        if (H, W) != (h, w):  # open_clip's transform for single Pillow images, to one grey level
            scale = {"shortest": max(h / H, w / W), "longest": min(h / H, w / W), "squash": None}[self.resize_mode]
            to_int = int if self.resize_mode == "shortest" and h == w else round
            new = (h, w) if scale is None else (to_int(H * scale + 1e-9), to_int(W * scale + 1e-9))
            for size in (H, new[1]), new:  # along x, then along y, each to whole grey levels
                x = F.interpolate(x, size, mode=self.interpolation, antialias=True).round().clamp(0, 255)
            top, left = (round((n - m) / 2) if n > m else -((m - n) // 2) for n, m in zip(new, (h, w)))  # crop, or pad
            x = F.pad(x, (-left, w - new[1] + left, -top, h - new[0] + top))
        return ((x / 255 - self.mean) / self.std).to(self.dtype)

    @torch.inference_mode()
    def embed_images(self, frames: np.ndarray | Tensor, batch_size: int = 64) -> Tensor:
        """uint8 frames (B, H, W, 3) -> unit vectors (B, D), fp32."""
        dtype, shape = getattr(frames, "dtype", type(frames).__name__), tuple(getattr(frames, "shape", ()))
        if str(dtype) not in ("uint8", "torch.uint8") or len(shape) != 4 or shape[-1] != 3 or 0 in shape:
            raise ValueError(f"frames are {dtype} {shape}; they have to be an array, uint8 (B, H, W, 3), and not empty")
        batches = (frames[i : i + batch_size] for i in range(0, len(frames), batch_size))
        return F.normalize(torch.cat([self.model.encode_image(self.preprocess(x)) for x in batches]).float(), dim=-1)

    @torch.inference_mode()
    def embed_text(self, prompts: str | list[str]) -> Tensor:
        """One sentence, or several whose unit vectors are averaged -> a unit vector (D,), fp32."""
        prompts = [prompts] if isinstance(prompts, str) else list(prompts)
        if not prompts or not all(isinstance(prompt, str) and prompt.strip() for prompt in prompts):
            raise ValueError(f'the prompt is {prompts}: write a sentence, such as "a humanoid robot kneeling"')
        tokens = self.tokenizer(prompts)  # (number of prompts, length)
        length = tokens.shape[1]
        for prompt, tail in zip(prompts, self.tokenizer(prompts, context_length=4 * length)[:, length:]):
            if (tail != tail[-1]).any():  # of a prompt that fits, only padding (all the same) lies beyond
                raise ValueError(f"the prompt exceeds the {length} tokens that this CLIP reads: {prompt[:40]}...")
        embeddings = self.model.encode_text(tokens.to(self.device))  # (number of prompts, D)
        return F.normalize(F.normalize(embeddings.float(), dim=-1).mean(0), dim=-1)


class VLMReward:
    """Equation (1): a function from frames psi(s) to rewards, for one task description.

    Called on uint8 frames (B, H, W, 3) it returns float32 rewards (B,). A prompt may be a list, to be averaged.
    """

    def __init__(
        self,
        clip: CLIP,
        goal_prompt: str | list[str],
        baseline_prompt: str | list[str] = "a humanoid robot",
        alpha: float = 0.5,
    ):
        if not isinstance(clip, CLIP):
            raise ValueError(f"clip is {clip!r}; it has to be a CLIP, such as CLIP() or CLIP(model)")
        self.clip, self.alpha = clip, alpha
        self.goal, self.baseline = clip.embed_text(goal_prompt), clip.embed_text(baseline_prompt)  # once for all
        self(np.zeros((1, *clip.size, 3), np.uint8))  # a mistake fails now, not in an hour

    def __call__(self, frames: np.ndarray | Tensor) -> np.ndarray:
        state = self.clip.embed_images(frames)  # (B, D)
        return goal_baseline_reward(state, self.goal, self.baseline, self.alpha).cpu().numpy()


class VLMRewardWrapper(gymnasium.Wrapper, gymnasium.utils.RecordConstructorArgs):
    """Any Gymnasium environment that draws itself, rewarded by reward_fn for the frame after each step.

    reward_fn: uint8 frames (B, H, W, 3) -> rewards (B,), such as a VLMReward. The environment's own reward moves to
    info["env_reward"]. Raises ValueError unless render_mode is "rgb_array".
    """

    def __init__(self, env: gymnasium.Env, reward_fn: Callable):
        gymnasium.utils.RecordConstructorArgs.__init__(self, reward_fn=reward_fn)  # for env.spec
        super().__init__(env)
        self.reward_fn = reward_fn
        if env.render_mode != "rgb_array":
            raise ValueError(f'render_mode is {env.render_mode!r}; make the environment with render_mode="rgb_array"')

    def step(self, action: np.ndarray) -> tuple:
        obs, reward, terminated, truncated, info = self.env.step(action)
        label = float(sac.label(self.reward_fn, self.env.render()[None])[0])
        return obs, label, terminated, truncated, info | {"env_reward": reward}


class VLMRewardVectorWrapper(gymnasium.vector.VectorWrapper):
    """The same for a vector environment: the frames of all its environments are labelled in one batch.

    Raises ValueError unless render_mode is "rgb_array", and for the autoreset mode SAME_STEP, in which the frame after
    an episode's last step already shows the next episode.
    """

    def __init__(self, env: gymnasium.vector.VectorEnv, reward_fn: Callable):
        super().__init__(env)
        self.reward_fn, self.mode = reward_fn, env.metadata.get("autoreset_mode")
        self.ended = np.zeros(env.num_envs, bool)
        if env.render_mode != "rgb_array" or self.mode == gymnasium.vector.AutoresetMode.SAME_STEP:
            given = f"render_mode is {env.render_mode!r}, autoreset_mode {self.mode}"
            raise ValueError(f'{given}; wanted are render_mode="rgb_array" and autoreset_mode NEXT_STEP or DISABLED')

    def reset(self, **settings) -> tuple:
        self.ended[:] = False
        return self.env.reset(**settings)

    def step(self, actions: np.ndarray) -> tuple:
        obs, reward, terminated, truncated, info = self.env.step(actions)
        rewards = sac.label(self.reward_fn, np.stack(self.env.render()))  # (N,)
        if self.mode == gymnasium.vector.AutoresetMode.NEXT_STEP:
            rewards[self.ended] = 0  # that step was only a reset, and Gymnasium has them rewarded by 0
        self.ended = terminated | truncated
        return obs, rewards, terminated, truncated, info | {"env_reward": reward}


# ----------------------------------------------------------------------------------------------------------------------
# 3. The scene: psi(s), the frame that stands for state s. App. C.2: realistic textures, and a camera that shows height.

CAMERA = dict(distance=3.5, elevation=-10.0, azimuth=180.0, lookat=(0, 0, 1))  # m, degrees; the paper's
ORIGINAL_CAMERA = dict(distance=4.0, elevation=-20, azimuth=90, lookat=(0, 0, 2))  # Gymnasium's, but it follows in x, y
SHELL, JOINT, ACCENT = (0.86, 0.88, 0.90, 1), (0.20, 0.22, 0.26, 1), (0.93, 0.45, 0.13, 1)  # rgba
PAINT = dict.fromkeys(["torso1", "head", "butt", "shin1", "larm"], SHELL) | dict(foot=ACCENT, hand=ACCENT)
PAINT |= dict.fromkeys(["uwaist", "lwaist", "thigh1", "uarm1"], JOINT)


class Scene:
    """Gymnasium's humanoid, repainted in memory, and a camera. Physics is untouched: there, any floor is endless.

    size: (height, width) in pixels. look: "realistic", or "original" for Gymnasium's own colours. effects: shadows,
    reflections and smooth edges, for people: CLIP sees the pose without them, at a fraction of the cost. Do not mix
    it with Gymnasium's own renderer in one process: that one draws into whichever window was used last.
    """

    def __init__(
        self, size: tuple[int, int] = (96, 96), look: str = "realistic", camera: dict = CAMERA, effects: bool = False
    ):
        if look not in ("realistic", "original"):
            raise ValueError(f'look is {look!r}; it has to be "realistic" or "original"')
        spec = mujoco.MjSpec.from_file(str(Path(gymnasium.__file__).parent / "envs/mujoco/assets/humanoid.xml"))  # v5's
        floor, tiles = spec.geom("floor"), spec.material("MatPlane")
        if look == "realistic":
            for texture in spec.textures:
                if texture.type == mujoco.mjtTexture.mjTEXTURE_SKYBOX:
                    texture.rgb1, texture.rgb2 = (0.75, 0.85, 0.95), (0.30, 0.50, 0.75)
                elif texture.name == "texplane":
                    texture.rgb1, texture.rgb2 = (0.55, 0.52, 0.48), (0.62, 0.59, 0.55)
                    texture.mark, texture.markrgb = mujoco.mjtMark.mjMARK_EDGE, (0.45, 0.42, 0.40)
            for geom in spec.geoms:
                if geom.name != "floor":
                    geom.material, geom.rgba = "", PAINT[geom.name.removeprefix("left_").removeprefix("right_")]
            floor.rgba, tiles.reflectance = (1, 1, 1, 1), 0.1
            light = spec.lights[0]
            light.dir, light.diffuse, light.ambient = (-0.5, 0.3, -1), (0.7, 0.7, 0.7), (0.25, 0.25, 0.25)
        if not effects:  # what costs time: many samples a pixel, round shapes of many facets, a floor of many tiles
            spec.visual.quality.offsamples, spec.visual.quality.numslices, spec.visual.quality.numstacks = 0, 8, 6
            floor.size, tiles.texrepeat = (5, 5, 0.125), [repeat / 4 for repeat in tiles.texrepeat]
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
        mujoco.mj_kinematics(self.model, data)  # positions of the bodies from qpos
        mujoco.mj_camlight(self.model, data)  # and of the light
        self.camera.lookat[:2] = data.qpos[:2]
        self.renderer.update_scene(data, self.camera)
        return self.renderer.render()


def each_state(model: mujoco.MjModel, states: np.ndarray) -> Iterator[mujoco.MjData]:
    """The simulator in each of the states, qpos (N, 24). Raises ValueError for other shapes, NaN, and if empty."""
    if np.ndim(states) != 2 or np.shape(states)[1] != model.nq or not len(states) or not np.isfinite(states).all():
        raise ValueError(f"states are {np.shape(states)}; they have to be (N, {model.nq}), finite, and not empty")
    data = mujoco.MjData(model)
    for qpos in states:
        data.qpos[:] = qpos
        yield data


def render_states(scene: Scene, states: np.ndarray) -> np.ndarray:
    """qpos (N, 24), as in each_state -> frames, uint8 (N, height, width, 3)."""
    frames = np.empty((len(states), *scene.size, 3), np.uint8)
    for data, frame in zip(each_state(scene.model, states), frames):
        frame[:] = scene.render(data)
    return frames


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
    turn = np.array([[left[1], -left[0], 0], [left[0], left[1], 0], [0, 0, 1]])  # rows: its forward, left, up
    origin = [*data.body("pelvis").xpos[:2], 0]

    def points(find, *names):  # bodies begin at their joints
        return (np.array([find(name).xpos for name in names]) - origin) @ turn.T

    return Pose(
        up=turn @ torso[:, 2],
        facing=turn @ torso[:, 0],
        head=points(data.geom, "head")[0],
        pelvis=points(data.body, "pelvis")[0],
        shoulders=points(data.body, "left_upper_arm", "right_upper_arm"),
        elbows=points(data.body, "left_lower_arm", "right_lower_arm"),
        hands=points(data.geom, "left_hand", "right_hand"),
        hips=points(data.body, "left_thigh", "right_thigh"),
        knees=points(data.body, "left_shin", "right_shin"),
        feet=points(data.geom, "left_foot", "right_foot"),
    )


def measure_states(model: mujoco.MjModel, states: np.ndarray) -> Pose:
    """qpos (N, 24), as in each_state -> a Pose of (N, ...) arrays."""
    return Pose(*map(np.stack, zip(*(measure(model, data) for data in each_state(model, states)))))


def lowest_point(model: mujoco.MjModel, data: mujoco.MjData) -> float:
    """Height of the body's lowest point above the floor, in metres."""
    mujoco.mj_kinematics(model, data)
    capsule = model.geom_type[1:] == mujoco.mjtGeom.mjGEOM_CAPSULE  # the rest are spheres; geom 0 is the floor
    # of a capsule, half its length as far as that points up or down; of both, their radius
    half = np.where(capsule, np.abs(data.geom_xmat[1:, 8]) * model.geom_size[1:, 1], 0)
    return float((data.geom_xpos[1:, 2] - model.geom_size[1:, 0] - half).min())


# ----------------------------------------------------------------------------------------------------------------------
# 4. The tasks of Tables 1-3: a prompt, and a judge in the place of the paper's person who watches videos: the paper's
# criterion in metres and degrees. It reads the simulator; neither training nor selection reads it.


X, Y, Z = 0, 1, 2  # standing, the pelvis is 0.87 m high, the head 1.48 m; radii: head 0.09, foot 0.075, knee 0.05 m
SIDES = np.array([1, -1])  # y * SIDES: how far outwards, for a (left, right) pair


# A condition is a function from a Pose to a dict of named parts, which all have to hold. What meets all but one is a
# near miss, which a good reward has to tell from the goal.
Condition = Callable[[Pose], dict]


def holds(condition: Condition, p: Pose) -> np.ndarray:
    """Whether every part of the condition holds: bool, with the pose's leading dimensions."""
    return np.logical_and.reduce(list(condition(p).values()))


def upright(p: Pose) -> np.ndarray:
    return p.up[..., Z] > 0.7  # the torso leans less than 45 degrees


def kneeling(p: Pose) -> dict:
    """Both knees on the floor, not far apart, shins behind them, upright; not sunk to a seat, nor in the lotus."""
    return {
        "upright": upright(p),
        "knees on the floor": (p.knees[..., Z] < 0.11).all(-1),
        "shins behind": (p.knees[..., X] - p.feet[..., X] > 0.15).all(-1),
        "knees near the middle": (np.abs(p.knees[..., Y]) < 0.30).all(-1),
        "not seated": (p.pelvis[..., Z] > 0.22) & ~holds(lotus, p),
    }


def lotus(p: Pose) -> dict:
    """Seated as low as these legs allow, both knees on the floor and turned out, both feet inwards of the knees."""
    out = p.knees[..., Y] * SIDES  # (..., 2)
    return {
        "seated upright": upright(p) & (p.pelvis[..., Z] < 0.32),
        "knees on the floor": (p.knees[..., Z] < 0.16).all(-1) & (p.knees[..., X] > -0.05).all(-1),
        "knees outwards": (out > 0.18).all(-1),
        "feet inwards": (out - p.feet[..., Y] * SIDES > 0.05).all(-1) & (np.abs(p.feet[..., X]) < 0.30).all(-1),
    }


def standing(p: Pose) -> dict:
    """On both feet, legs nearly straight, torso upright."""
    return {
        "torso upright": p.up[..., Z] > 0.8,
        "at full height": p.pelvis[..., Z] > 0.80,
        "both feet down": (p.feet[..., Z] < 0.13).all(-1),
    }


def splits(p: Pose) -> dict:
    """On the floor, both legs straight along it and each more than 45 degrees to its own side, torso upright."""
    leg, thigh, shin = p.feet - p.hips, p.knees - p.hips, p.feet - p.knees
    lengths = np.linalg.norm(thigh, axis=-1) * np.linalg.norm(shin, axis=-1)
    return {
        "upright": upright(p),
        "on the floor": (p.pelvis[..., Z] < 0.22) & (p.feet[..., Z] < 0.25).all(-1),
        "legs straight": ((thigh * shin).sum(-1) > 0.87 * lengths).all(-1),  # bent by less than 30 degrees
        "legs to the sides": (leg[..., Y] * SIDES > np.abs(leg[..., X])).all(-1),
    }


def one_leg(p: Pose) -> dict:
    """One foot alone on the floor, the other at least 15 cm above it, and otherwise standing."""
    low, high = p.feet[..., Z].min(-1), p.feet[..., Z].max(-1)
    return {
        "upright at full height": (p.up[..., Z] > 0.8) & (p.pelvis[..., Z] > 0.80),
        "a foot down": low < 0.13,
        "the other up": high - low > 0.15,
    }


def raised(p: Pose) -> dict:
    """Both hands above the top of the head."""
    return {"hands above the head": (p.hands[..., Z] > p.head[..., Z, None] + 0.09).all(-1)}


def on_hips(p: Pose) -> dict:
    """Each hand within 15 cm of its side of the pelvis and not hanging below it, elbows further out."""
    hip = p.pelvis[..., None, :] + np.array([[0, 0.2, 0], [0, -0.2, 0]])  # (..., 2, 3) 20 cm to each side
    near = np.linalg.norm(p.hands - hip, axis=-1) < 0.15
    high = p.hands[..., Z] > p.pelvis[..., Z, None] - 0.08
    return {"hands on the hips": (near & high & ((p.elbows - p.hands)[..., Y] * SIDES > 0)).all(-1)}


def crossed(p: Pose) -> dict:
    """Forearms really crossed before the chest: each hand past the middle, and further than its elbow."""
    past = (p.hands[..., Y] * SIDES < -0.04) & ((p.elbows - p.hands)[..., Y] * SIDES > 0)
    low, high = p.pelvis[..., Z, None] + 0.1, p.shoulders[..., Z] + 0.05
    before = (p.hands[..., X] > 0.05) & (p.hands[..., Z] > low) & (p.hands[..., Z] < high)
    level = np.abs(p.hands[..., 0, Z] - p.hands[..., 1, Z]) < 0.2
    return {"forearms crossed": past.all(-1), "before the chest": before.all(-1) & level}


def both(body: Condition, arms: Condition) -> Condition:
    """The one and the other. For near misses, the body's whole condition is one part."""
    return lambda p: {body.__name__: holds(body, p)} | arms(p)


BASELINE_PROMPT = "a humanoid robot"  # for all eight tasks
TASKS: dict[str, tuple[str, Condition]] = {  # name: (goal prompt, success condition)
    "kneeling": ("a humanoid robot kneeling", kneeling),
    "lotus": ("a humanoid robot seated down, meditating in the lotus position", lotus),
    "standing": ("a humanoid robot standing up", standing),
    "arms-raised": ("a humanoid robot standing up, with both arms raised", both(standing, raised)),
    "splits": ("a humanoid robot practicing gymnastics, doing the side splits", splits),
    "hands-on-hips": ("a humanoid robot standing up with hands on hips", both(standing, on_hips)),
    "one-leg": ("a humanoid robot standing up on one leg", one_leg),
    "arms-crossed": ("a humanoid robot standing up, with its arms crossed", both(standing, crossed)),
}


COMPOSITIONS: dict[str, tuple[str, Condition]] = {  # tinyclip was shown these legs and these arms, but never together
    "kneeling-arms-raised": ("a humanoid robot kneeling, with both arms raised", both(kneeling, raised)),
    "kneeling-hands-on-hips": ("a humanoid robot kneeling with hands on hips", both(kneeling, on_hips)),
    "lotus-arms-raised": ("a humanoid robot in the lotus position, with both arms raised", both(lotus, raised)),
    "splits-arms-raised": ("a humanoid robot doing the side splits, with both arms raised", both(splits, raised)),
    "splits-arms-crossed": ("a humanoid robot doing the side splits, with its arms crossed", both(splits, crossed)),
}
JUDGED = TASKS | COMPOSITIONS


class Humanoid(HumanoidEnv):
    """Gymnasium's Humanoid-v5 in a Scene. No posture ends an episode. info["success"] is the task's condition."""

    def __init__(self, scene: Scene, condition: Condition | None = None):
        self.scene, self.condition = scene, condition
        super().__init__(terminate_when_unhealthy=False, render_mode="rgb_array")

    def _initialize_simulation(self):  # Gymnasium's hook for loading a model file
        return self.scene.model, mujoco.MjData(self.scene.model)

    def do_simulation(self, ctrl: np.ndarray, n_frames: int):
        super().do_simulation(ctrl, n_frames)
        mujoco.mj_kinematics(self.model, self.data)  # else Gymnasium's bodies lag a physics step behind qpos

    def step(self, action: np.ndarray) -> tuple:
        observation, reward, terminated, truncated, _ = super().step(action)
        info = {}
        if self.condition is not None:
            info["success"] = bool(holds(self.condition, measure(self.model, self.data)))
        return observation, reward, terminated, truncated, info

    def render(self) -> np.ndarray:
        return self.scene.render(self.data)


def make_envs(
    scene: Scene, condition: Condition | None = None, count: int = 16, episode_steps: int = 100
) -> gymnasium.vector.VectorEnv:
    """`count` humanoids that share one scene. Episodes end by truncation after episode_steps; 100 are 1.5 seconds."""
    if count < 1 or episode_steps < 1 or not (condition is None or callable(condition)):
        given = f"count is {count}, episode_steps {episode_steps}, condition {condition!r}"
        raise ValueError(f"{given}; at least 1 environment and step are needed, and a function such as kneeling")
    makers = [lambda: gymnasium.wrappers.TimeLimit(Humanoid(scene, condition), episode_steps)] * count
    return gymnasium.vector.SyncVectorEnv(makers, autoreset_mode=gymnasium.vector.AutoresetMode.DISABLED)


def success_rates(success: np.ndarray) -> tuple[float, float]:
    """Success at each step of some episodes, (episodes, steps) -> two shares of the episodes; NaN without a condition.

    The paper's rule: the condition holds in at least half of the steps. Beside it, the share of episodes in which it
    holds in each of the last 20 steps, which says whether the robot stays so. Raises ValueError for other shapes.
    """
    success = np.asarray(success, dtype=float)
    if success.ndim != 2 or 0 in success.shape:
        raise ValueError(f"success is {success.shape}; it has to be (episodes, steps), and not empty")
    if np.isnan(success).any():
        return float("nan"), float("nan")
    return float((success.mean(1) >= 0.5).mean()), float(success[:, -20:].all(1).mean())


# ----------------------------------------------------------------------------------------------------------------------
# 5. Judging a reward before training on it: how far is it from "is the goal reached?" over many different states?

EVALUATION_STATES = Path(__file__).parent / "evaluation" / "states.npz"


def canonically_shaped(reward: np.ndarray, gamma: float) -> np.ndarray:
    """C(R) beneath equation (4): removes what potential shaping adds, which changes a reward but no optimal policy.

    reward (S, A, S): R(s, a, s') of a finite problem -> the same shape. States and actions are drawn uniformly.
    """
    mean = reward.mean((1, 2))  # (S,) E[R(s, A, S')]
    return reward + gamma * mean - mean[:, None, None] - gamma * mean.mean()  # of s' (the last axis), of s, of all


def epic_distance(reward_a: np.ndarray, reward_b: np.ndarray, gamma: float = 0.99) -> float:
    """Equation (4), Definition 2: 0 for rewards that differ by scale, shift and shaping alone, 1 for opposite ones.

    Both (S, A, S): any rewards R(s, a, s') of a finite problem. Both (N,): rewards of N states; then, by Lemma 1, since
    R depends on s' alone, no shaping is needed. Raises ValueError for other shapes, NaN, or a constant reward.
    """
    a, b = (np.asarray(reward, dtype=np.float64) for reward in (reward_a, reward_b))
    if a.shape != b.shape or a.ndim not in (1, 3) or a.shape[0] != a.shape[-1]:
        raise ValueError(f"rewards of shapes {a.shape} and {b.shape}; they have to be both (N,) or both (S, A, S)")
    if not a.size or not np.isfinite(a).all() or not np.isfinite(b).all():
        raise ValueError("the rewards are empty, NaN or infinite: their correlation is undefined")
    if not 0 <= gamma <= 1:
        raise ValueError(f"gamma is {gamma}; it has to be in [0, 1]")
    a, b = (x / (np.abs(x).max() or 1) for x in (a, b))  # so that no square overflows or vanishes
    if a.ndim == 3:
        a, b = canonically_shaped(a, gamma), canonically_shaped(b, gamma)
    a, b = a - a.mean(), b - b.mean()
    norms = np.linalg.norm(a), np.linalg.norm(b)
    if min(norms) < 1e-12:
        raise ValueError("a reward is constant here: its correlation with another is undefined")
    # with rho the correlation, |x - y|^2 = 2 - 2 rho for unit vectors; sqrt((1 - rho) / 2) itself would lose digits
    return float(np.linalg.norm(a / norms[0] - b / norms[1]) / 2)


def auc(reward: np.ndarray, goal: np.ndarray) -> float:
    """The chance that a goal state (goal: bool (N,)) has a higher reward (N,) than one that is not; ties count half.

    NaN where one of the two kinds is missing. Raises ValueError for other shapes or types, and for NaN rewards.
    """
    reward, goal = np.asarray(reward), np.asarray(goal)
    alike = reward.ndim == 1 and reward.shape == goal.shape and goal.dtype == bool
    if not alike or reward.dtype.kind not in "biuf" or np.isnan(reward).any():
        given = f"rewards are {reward.dtype} {reward.shape}, goals {goal.dtype} {goal.shape}"
        raise ValueError(f"{given}; they have to be (N,) without NaN, and bool (N,)")
    if goal.all() or not goal.any():
        return float("nan")
    ours, others = reward[goal][:, None], reward[~goal]
    return float((ours > others).mean() + 0.5 * (ours == others).mean())


def pose_path(model: mujoco.MjModel, start: np.ndarray, goal: np.ndarray, count: int = 25) -> np.ndarray:
    """`count` states from one qpos (24,) to another, each joint in equal steps, the body always on the floor."""
    data, path = mujoco.MjData(model), []
    if start[3:7] @ goal[3:7] < 0:
        start = np.concatenate([start[:3], -start[3:7], start[7:]])  # the same orientation, nearer as a quaternion
    for t in np.linspace(0, 1, count):
        data.qpos[:] = (1 - t) * start + t * goal
        data.qpos[2] -= lowest_point(model, data)
        path.append(data.qpos.copy())
    return np.array(path)


def goal_states(task: str) -> np.ndarray:
    """Scripted poses that meet the task's condition, qpos (N, 24); a composition's have another pose's arms."""
    if task not in JUDGED:
        raise ValueError(f"the task is {task!r}; it has to be one of {', '.join(JUDGED)}")
    with np.load(EVALUATION_STATES) as file:
        states = file["states"][np.char.startswith(file["origin"], "scripted")].astype(float)
    model, condition = Scene().model, JUDGED[task][1]
    if task in COMPOSITIONS:
        states, rng = np.repeat(states, 8, 0), np.random.default_rng(0)
        states[:, 18:] = states[rng.permutation(len(states)), 18:]  # the joints of the arms
    return states[holds(condition, measure_states(model, states))]


def embed_states(clip: CLIP, scene: Scene, states: np.ndarray, bar: tqdm) -> Tensor:
    """qpos (N, 24) -> embeddings of their pictures (N, D), a few hundred at a time to bound the memory."""
    parts = []
    for part in np.array_split(states, -(-len(states) // 256)):
        parts.append(clip.embed_images(render_states(scene, part)))
        bar.update(len(part))
    return torch.cat(parts)


OURS = "textures and camera"
SCENES = {  # look and camera, as in Fig. 3
    "original": ("original", ORIGINAL_CAMERA),
    "textures": ("realistic", ORIGINAL_CAMERA),
    OURS: ("realistic", CAMERA),
}


def short(model: str) -> str:
    """A model's name as a folder may have it."""
    name = Path(model.removeprefix("local-dir:")).resolve().name if model.startswith("local-dir:") else model
    return name.replace("/", "-").replace(":", "-")


def write_csv(path: Path, columns: Iterable[str], rows: list[dict]):
    with sac.atomic_open(path, "w") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows({k: v if isinstance(v, str) else f"{v:.8g}" for k, v in row.items()} for row in rows)


def evaluate(args: argparse.Namespace):
    """Compares CLIP rewards with success conditions on the fixed states in evaluation/, and leaves in runs/evaluate/:

    table.csv    for each model, scene, alpha and task: EPIC distance (0 perfect, .71 unrelated), Pearson
                 correlation, and AUC against all other states and against near misses alone
    epic_*.png   EPIC by alpha, by size of the model, and by scene, the models side by side
    MODEL/paths.png, MODEL/histograms.png, MODEL/frames.png    what the reward of one model looks like
    """
    start, device = time.time(), args.device or default_device()
    out, tasks = args.out or Path("runs/evaluate"), list(dict.fromkeys(args.task or TASKS))
    alphas = sorted(set(args.alpha))
    middle = alphas[len(alphas) // 2]  # for figures of one alpha
    models = {short(model): model for model in args.model}
    if len(models) < len(args.model):
        raise ValueError(f"the models {', '.join(args.model)} would share a name: rename a folder, or name each once")
    check_free(out, args.overwrite, "table.csv")
    out.mkdir(parents=True, exist_ok=True)  # where that is not allowed, say so now
    with np.load(EVALUATION_STATES) as file:
        states, origin = file["states"].astype(float), file["origin"]  # qpos (N, 24), and where each comes from
    body = Scene().model
    pose = measure_states(body, states)
    parts = {task: np.stack(list(TASKS[task][1](pose).values())) for task in TASKS}  # bool (parts, N) each
    goals = {task: p.all(0) for task, p in parts.items()}  # bool (N,)
    near = {task: p.sum(0) >= len(p) - 1 for task, p in parts.items()}  # the goal, and what misses one part of it
    example = {task: states[goals[task] & (origin == f"scripted {task}")][0] for task in TASKS}
    begin = {task: example["kneeling" if task == "standing" else "standing"] for task in tasks}
    paths = {task: pose_path(body, begin[task], example[task]) for task in tasks}
    rows = []
    with tqdm(total=len(models) * (len(SCENES) * len(states) + sum(map(len, paths.values()))), unit="frame") as bar:
        for name, model in models.items():
            clip = None  # before the next is loaded: a GPU need not hold two
            clip = CLIP(model, device, args.precision)
            size = sum(p.numel() for p in clip.model.visual.parameters())
            baseline = clip.embed_text(args.baseline or [BASELINE_PROMPT])
            goal = {task: clip.embed_text(TASKS[task][0]) for task in tasks}  # (D,) each
            rewards, curves, scene = {}, {}, Scene(clip.size)
            for task in tasks:  # first the few frames: an alpha or a prompt that makes no sense fails here
                path = embed_states(clip, scene, paths[task], bar)
                for alpha in alphas:
                    curves[task, alpha] = goal_baseline_reward(path, goal[task], baseline, alpha).cpu().numpy()
            seen = {key: embed_states(clip, Scene(clip.size, *scene), states, bar) for key, scene in SCENES.items()}
            for task, alpha, key in itertools.product(tasks, alphas, SCENES):
                r = goal_baseline_reward(seen[key], goal[task], baseline, alpha).cpu().numpy()
                y, among, epic = goals[task], near[task], epic_distance(r, goals[task])
                row = dict(model=name, parameters=size, scene=key, alpha=alpha, task=task, epic=epic)
                row |= dict(pearson=1 - 2 * epic**2, auc=auc(r, y), auc_near=auc(r[among], y[among]))
                rows.append(row)
                if alpha == middle and key == OURS:
                    rewards[task] = r
            if name == next(iter(models)):  # there is a result: now an older one may go
                shutil.rmtree(out, ignore_errors=True)
            (out / name).mkdir(parents=True)
            write_csv(out / "table.csv", rows[0], rows)
            plot_paths(out / name / "paths.png", name, paths, curves)
            plot_histograms(out / name / "histograms.png", f"{name}, alpha {middle:g}", rewards, goals)
            plot_frames(out / name / "frames.png", f"{name}, alpha {middle:g}", rewards, goals, states)
            plot_epic(out, rows, middle)
    print("model                     parameters alpha  task            EPIC    AUC   near Pearson")
    line = "{model:24.24} {parameters:11,} {alpha:5g}  {task:14} {epic:5.3f} {auc:6.4f} {auc_near:6.4f} {pearson:7.3f}"
    for row in rows:
        if row["scene"] == OURS:
            print(line.format(**row))
    print(f"{len(states):,} states, {time.time() - start:.0f} seconds. See the figures and table.csv in {out}/")


def panels(count: int, caption: str, **labels) -> tuple[Figure, np.ndarray]:
    """A captioned figure with `count` panels, up to four in a row."""
    across, down = min(count, 4), -(-count // 4)
    figure = Figure(figsize=(max(3.4 * across, 6.8), 3 * down + 0.9), layout="constrained")
    figure.suptitle(caption, fontsize="medium", wrap=True)
    axes = figure.subplots(down, across, squeeze=False).ravel()
    for axis in axes[count:]:
        axis.set_axis_off()
    for axis in axes[:count]:
        axis.set(**labels)
    return figure, axes[:count]


def plot_paths(file: Path, name: str, paths: dict, curves: dict):
    """paths[task]: states (T, 24); curves[task, alpha]: their rewards (T,)."""
    caption = f"{name}: reward along a path of poses that ends in the goal; grey where it is reached. A good one rises"
    figure, axes = panels(len(paths), caption, xlabel="share of the way", ylabel="reward")
    scene = Scene((96, 96))
    for axis, (task, states) in zip(axes, paths.items()):
        way, reached = np.linspace(0, 1, len(states)), holds(TASKS[task][1], measure_states(scene.model, states))
        axis.fill_between(way, 0, 1, reached, step="mid", color="0.9", transform=axis.get_xaxis_transform())
        for alpha in [alpha for key, alpha in curves if key == task]:
            axis.plot(way, curves[task, alpha], color=(0.8 * alpha, 0.3, 0.8 * (1 - alpha)), label=f"alpha {alpha:g}")
        strip = axis.inset_axes([0, 1.02, 1, 0.24], xticks=[], yticks=[], title=task)
        strip.imshow(np.concatenate(list(render_states(scene, states[::6])), 1), aspect="auto")
    axes[0].legend(fontsize="x-small")
    figure.savefig(file, dpi=100)


def plot_histograms(file: Path, name: str, rewards: dict, goals: dict):
    """rewards[task], goals[task]: of all states, (N,)."""
    caption = f"{name}: rewards of goal states and of all others. A good reward keeps them apart"
    figure, axes = panels(len(rewards), caption, xlabel="reward", ylabel="share of its kind")
    for axis, (task, r) in zip(axes, rewards.items()):
        goal = goals[task]
        bins = np.linspace(r.min(), r.max(), 40)
        for kind, which in ("other", ~goal), ("goal", goal):
            n = which.sum()
            axis.hist(r[which], bins, weights=np.full(n, 1 / n), alpha=0.6, label=f"{kind} ({n})")
        axis.set_title(task)
        axis.legend(fontsize="x-small")
    figure.savefig(file, dpi=100)


def plot_frames(file: Path, name: str, rewards: dict, goals: dict, states: np.ndarray):
    """What a reward really likes: the first thing to look at before training on it."""
    figure = Figure(figsize=(15, 1.05 * len(rewards) + 0.7), layout="constrained")
    scene = Scene((160, 160), effects=True)
    figure.suptitle(f"{name}: frames (their middle) by reward; green: the goal, by the simulator")
    for row, (task, r) in zip(figure.subplots(len(rewards), 4, squeeze=False), rewards.items()):
        goal, order = goals[task], r.argsort()[::-1]
        kinds = {
            "highest of all": order[:6],
            "highest that are not the goal": order[~goal[order]][:6],
            "lowest that are the goal": order[goal[order]][-6:],
            "lowest of all": order[-6:],
        }
        row[0].set_ylabel(task)
        for axis, (kind, which) in zip(row, kinds.items()):
            tiles = render_states(scene, states[which])[:, 25:143, 21:139]
            for tile, reached in zip(tiles, goal[which]):
                color = (40, 180, 60) if reached else (0, 0, 0)
                tile[:3], tile[-3:], tile[:, :3], tile[:, -3:] = color, color, color, color
            axis.imshow(np.concatenate(tiles, 1))
            axis.set(xticks=59 + 118 * np.arange(len(tiles)), yticks=[], xticklabels=[f"{x:.2f}" for x in r[which]])
            if row[0].get_subplotspec().is_first_row():
                axis.set_title(kind, fontsize="medium")
    figure.savefig(file, dpi=100)


def plot_epic(out: Path, rows: list[dict], middle: float):
    """EPIC against alpha (Fig. 4a), against the number of parameters (Fig. 4b), and by scene (Fig. 3)."""
    tasks, models = (list(dict.fromkeys(row[key] for row in rows)) for key in ("task", "model"))
    caption = "EPIC distance of the reward to the goal, by alpha: 0 is perfect, 0.71 unrelated"
    figure, axes = panels(len(tasks), caption, xlabel="alpha", ylabel="EPIC distance", ylim=(0, 1))
    for axis, task in zip(axes, tasks):
        axis.axhline(0.5**0.5, color="0.7", ls=":")
        axis.set_title(task)
        for model in models:
            some = [row for row in rows if (row["task"], row["model"], row["scene"]) == (task, model, OURS)]
            axis.plot([row["alpha"] for row in some], [row["epic"] for row in some], "o-", ms=3, label=model)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside right center", fontsize="x-small")
    figure.savefig(out / "epic_alpha.png", dpi=100)

    def mean(**wanted):  # over the tasks
        return np.mean([row["epic"] for row in rows if wanted.items() <= row.items()])

    sizes = [next(row["parameters"] for row in rows if row["model"] == model) for model in models]
    epics = [mean(model=model, scene=OURS, alpha=middle) for model in models]
    caption = f"Mean EPIC distance over {len(tasks)} tasks, alpha {middle:g}, by model size"
    if len(set(sizes)) > 2:
        caption += f"; correlation with log size {np.corrcoef(np.log(sizes), epics)[0, 1]:.2f}"
    figure, (axis,) = panels(1, caption, xlabel="parameters of the image tower", ylabel="EPIC distance", xscale="log")
    for model, size, epic in zip(models, sizes, epics):
        axis.plot(size, epic, "o", label=model)
    figure.legend(loc="outside right center", fontsize="x-small")
    figure.savefig(out / "epic_size.png", dpi=100)

    caption = f"Mean EPIC distance over {len(tasks)} tasks, alpha {middle:g}, by what CLIP is shown"
    figure, (axis,) = panels(1, caption, ylabel="EPIC distance", ylim=(0, 1))
    width = 0.8 / len(models)
    for i, model in enumerate(models):
        epics = [mean(model=model, scene=scene, alpha=middle) for scene in SCENES]
        axis.bar(np.arange(len(SCENES)) + (i + 0.5) * width - 0.4, epics, width, label=model)
    axis.set_xticks(range(len(SCENES)), SCENES)
    figure.legend(loc="outside right center", fontsize="x-small")
    figure.savefig(out / "epic_scene.png", dpi=100)


# ----------------------------------------------------------------------------------------------------------------------
# 6. Training, and the command line


def plot_curve(rows: list[dict], prompt: str, goal_reward: float | None, path: Path):
    """CLIP reward beside the independent success rate: where only the first rises, the policy hacks the reward."""
    evaluated = [row for row in rows if "eval_reward" in row]
    figure, (left,) = panels(1, f'"{prompt}"', xlabel="environment steps", ylabel="mean CLIP reward of a step")
    right = left.twinx()
    right.set(ylabel="success rate, judged from the simulator", ylim=(-0.02, 1.02))
    for axis, key, style, some, label in (
        (left, "reward", "#b3d1e7", rows, "CLIP reward while exploring"),
        (left, "eval_reward", "C0o-", evaluated, "CLIP reward of the deterministic policy"),
        (right, "eval_success", "C1o-", evaluated, "success (half of the steps)"),
        (right, "eval_success_held", "C1:", evaluated, "success (held through the last 20)"),
    ):
        axis.plot([row["steps"] for row in some], [row[key] for row in some], style, ms=3, label=label)
    if goal_reward is None:
        right.remove()  # a sentence without a success condition
    else:
        left.axhline(goal_reward, color="C0", ls=":", label="CLIP reward of a goal pose at every step")
    figure.legend(loc="outside lower center", ncols=2, fontsize="small")
    with sac.atomic_open(path) as file:
        figure.savefig(file, dpi=120)


def record_video(
    act: Callable, camera: dict, look: str, path: Path, steps: int = 100, episodes: int = 3, seed: int = 3 * 10**9
):
    """A GIF of whole episodes at half of real speed: left from CLIP's camera, right from further round."""
    side = camera | dict(azimuth=camera["azimuth"] - 65)
    views = [Scene((240, 240), look, view, effects=True) for view in (camera, side)]
    env, frames = Humanoid(views[0]), []
    for episode in range(episodes):
        obs, _ = env.reset(seed=seed + episode)
        for i in range(steps):
            if i % 3 == 0:
                frames.append(Image.fromarray(np.concatenate([view.render(env.data) for view in views], 1)))
            obs = env.step(env.action_space.high * act(obs[None])[0])[0]
    with sac.atomic_open(path) as file:  # 3 steps of 15 ms are shown for 90 ms
        frames[0].save(file, "GIF", save_all=True, append_images=frames[1:], duration=90, loop=0)


def read_metrics(path: Path) -> list[dict]:
    """A run's metrics.csv: a dict of numbers for each round, without what is empty."""
    with open(path, newline="") as file:
        return [{key: float(value) for key, value in row.items() if value} for row in csv.DictReader(file)]


def check_free(out: Path, overwrite: bool, *marks: str):
    """Raises ValueError unless the folder is new or empty, or may be overwritten and holds all the files `marks`."""
    ours = all((out / mark).exists() for mark in marks)
    if out.is_file() or out.is_dir() and any(out.iterdir()) and not (overwrite and ours):
        resume = " (an interrupted training goes on by --resume)" if "metrics.csv" in marks else ""
        advice = f"replace it by --overwrite{resume}, or " if ours else ""
        kind = ", ".join(marks) if ours else "other files"
        raise ValueError(f"{out} already holds {kind}: {advice}name another folder by --out")


COLUMNS = "steps reward success success_held eval_reward eval_success eval_success_held".split()
COLUMNS += "critic_loss actor_loss temperature entropy".split()
NOT_SETTINGS = "command", "overwrite", "resume", "typed"


def resumed(args: argparse.Namespace) -> argparse.Namespace:
    """The settings of the interrupted run args.resume. Raises ValueError if there is none, or if others were given."""
    run = args.resume
    if (run / "result.json").exists():
        raise ValueError(f"{run} is complete: there is nothing to resume")
    if not (run / "checkpoint").is_dir() or not (run / "config.json").exists():
        raise ValueError(f"{run} holds no interrupted run: config.json and checkpoint/ should be there")
    others = [word for word in args.typed if word.startswith("--") and word.split("=")[0] != "--resume"] + args.prompt
    if others:
        raise ValueError(f"{run} goes on with the settings it was begun with: leave out {' '.join(others)}")
    try:
        settings = dict(json.loads((run / "config.json").read_text()))
        read_metrics(run / "metrics.csv")
    except (ValueError, TypeError) as error:
        raise ValueError(f"config.json or metrics.csv in {run} is damaged ({error})") from error
    if settings.keys() != vars(args).keys() - set(NOT_SETTINGS):
        raise ValueError(f"{run} was begun by another version of vlmrm.py: it cannot be resumed by this one")
    return argparse.Namespace(**settings | dict(out=run, resume=run))


def join_torchrun(device: str) -> str:
    """Under torchrun, joins its other processes. Returns this process' device: on a GPU, one of its own if there is."""
    local = int(os.environ.get("LOCAL_RANK", 0))  # torchrun sets these: this process' number on its machine, ...
    world, here = (int(os.environ.get(name, 1)) for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE"))  # how many, and here
    if world > 1:
        gpus = torch.cuda.device_count()
        if device.startswith("cuda") and gpus:
            device = f"cuda:{local % gpus}"
            torch.cuda.set_device(device)
        torch.distributed.init_process_group("nccl" if device != "cpu" and here <= gpus else "gloo")  # a GPU for each
    return device


def run_name(task: str | None, prompt: list[str], args: argparse.Namespace) -> str:
    """Of a run's own folder: the task, or what the prompt has of letters and digits, and what is unusual."""
    name = task or "-".join("".join(c if c.isalnum() else " " for c in prompt[0].lower()).split())[:60] or "prompt"
    if args.model != EMBEDDED_CLIP:
        name += f"-{short(args.model)}"
    for setting, usual in dict(alpha=0.5, pink=0, gamma=0.95, azimuth=CAMERA["azimuth"]).items():
        if getattr(args, setting) != usual:
            name += f"-{setting}{getattr(args, setting):g}"
    return f"{name}-seed{args.seed}"


def train(args: argparse.Namespace):
    """Trains SAC on the humanoid, rewarded by CLIP for looking like a sentence, and leaves in runs/NAME/:

    video.gif    the best policy, in three new episodes
    curve.png    CLIP reward beside success, over training
    result.json  success by two rules over 100 new episodes, and what zero, random and untrained actions reach
    policy.pt    the best policy's weights; also metrics.csv and config.json
    """
    start, args = time.time(), resumed(args) if args.resume else args
    device = join_torchrun(args.device or default_device())
    rank, world = sac.processes()
    known = {(prompt,): task for task, (prompt, _) in JUDGED.items()}
    task = args.task or (known.get(tuple(args.prompt)) if args.prompt else "kneeling")  # None: no one judges it
    prompt, condition = args.prompt or [JUDGED[task][0]], JUDGED[task][1] if task else None
    baseline = args.baseline or [BASELINE_PROMPT]
    out = args.out or Path("runs") / run_name(task, prompt, args)
    if rank == 0 and not args.resume:
        check_free(out, args.overwrite, "config.json", "metrics.csv")
    if not all(map(np.isfinite, (args.distance, args.elevation, args.azimuth))) or args.distance <= 0:
        given = f"--distance {args.distance}, --elevation {args.elevation}, --azimuth {args.azimuth}"
        raise ValueError(f"{given}: a camera needs finite numbers, and some distance")
    if args.envs < 1 or args.episodes < 1 or args.envs % world or args.batch_size % world:
        given = f"--envs {args.envs}, --episodes {args.episodes}, --batch-size {args.batch_size}"
        raise ValueError(f"{given}: at least 1 each, the first and the last in equal shares for {world} processes")
    config = sac.Config(**{field.name: getattr(args, field.name) for field in fields(sac.Config)})
    if config.buffer_size < (steps := config.round_steps * args.envs):
        raise ValueError(f"--buffer-size {config.buffer_size}: it has to hold a round, here of {steps} steps")

    clip = CLIP(args.model, device, args.precision)
    reward_fn = VLMReward(clip, prompt, baseline, args.alpha)
    camera = CAMERA | dict(distance=args.distance, elevation=args.elevation, azimuth=args.azimuth)
    scene = Scene(clip.size, args.look, camera)
    scene.render(mujoco.MjData(scene.model))  # without OpenGL, fail now and not after the first round
    envs, eval_envs = (make_envs(scene, condition, args.envs // world, config.round_steps) for _ in range(2))
    agent = sac.SAC(envs.single_observation_space, envs.single_action_space, config, device)

    def judge(act, label_with=None):  # (rewards, success) on seeds that neither training nor selection uses
        return sac.evaluate(eval_envs, act, label_with, args.episodes, seed=2 * 10**9, episode_steps=config.round_steps)

    folder, metrics = out / "checkpoint", out / "metrics.csv"
    if rank == 0 and not args.resume:
        if args.overwrite:
            shutil.rmtree(out, ignore_errors=True)
        folder.mkdir(parents=True)  # fails if the same command was started twice
        settings = {key: value for key, value in vars(args).items() if key not in NOT_SETTINGS}
        settings |= dict(prompt=prompt, baseline=baseline, task=task, out=str(out))
        with sac.atomic_open(out / "config.json", "w") as file:
            file.write(json.dumps(settings, indent=1) + "\n")
        write_csv(metrics, COLUMNS, [])
    if world > 1:
        torch.distributed.barrier()  # an older run is gone before any process looks for a checkpoint

    references, rng = {}, np.random.default_rng([args.seed, rank])
    shape = envs.action_space.shape
    if condition:
        for reference, act in (
            ("zero action", lambda obs: np.zeros(shape)),
            ("untrained network", agent.best_action),
            ("random policy", lambda obs: rng.uniform(-1, 1, shape)),
        ):
            half, held = success_rates(judge(act)[1])
            references[reference] = dict(success=half, success_held=held)

    if rank == 0:
        print(f"Training {prompt} against {baseline}, alpha {args.alpha:g}, on {device}, into {out}/")
    rows = read_metrics(metrics) if rank == 0 else []
    done = int(rows[-1]["steps"]) if rows else 0
    with tqdm(total=config.steps, initial=done, unit="step", disable=rank > 0) as bar:  # only one process shows, writes
        for row in sac.train(agent, envs, eval_envs, reward_fn, folder):
            for key in ("success", "eval_success"):
                if key in row:
                    row[key], row[key + "_held"] = success_rates(row[key])
            best = row.pop("best", False)
            rows = [*(old for old in rows if old["steps"] < row["steps"]), row]  # a resumed round replaces its row
            if rank == 0:
                if len(rows) * config.round_steps * args.envs != row["steps"]:
                    raise ValueError(f"{metrics} is damaged: it lacks rounds that the checkpoint holds")
                write_csv(metrics, COLUMNS, rows)
                if best:
                    with sac.atomic_open(out / "policy.pt") as file:
                        torch.save(agent.state_dict(), file)
            succeeded = f", success {row['success']:.0%}" if condition else ""
            bar.set_postfix_str(f"CLIP reward {row['reward']:.3f}{succeeded}")
            bar.update(row["steps"] - bar.n)

    rewards, success = judge(agent.best_action, reward_fn)
    half, held = success_rates(success) if condition else (None, None)
    if world > 1:
        torch.distributed.destroy_process_group()
    if rank > 0:
        return
    with sac.atomic_open(out / "policy.pt") as file:  # again, for a GPU may resume a round to other last bits
        torch.save(agent.state_dict(), file)
    goal_reward = float(reward_fn(render_states(scene, goal_states(task))).mean()) if condition else None
    plot_curve(rows, prompt[0], goal_reward, out / "curve.png")
    record_video(agent.best_action, camera, args.look, out / "video.gif", config.round_steps)
    steps = int(rows[-1]["steps"])
    result = dict(prompt=prompt, task=task, model=args.model, alpha=args.alpha, seed=args.seed, steps=steps)
    result |= dict(episodes=args.episodes, success=half, success_held=held, reward=float(rewards.mean()))
    result |= dict(reward_at_the_end=float(rewards[:, -20:].mean()), reward_of_goal_poses=goal_reward)
    result |= dict(references=references, seconds=None if args.resume else round(time.time() - start, 1))
    with sac.atomic_open(out / "result.json", "w") as file:
        file.write(json.dumps(result, indent=1) + "\n")
    shutil.rmtree(folder)
    found = f"Success {half:.0%}, held to the end {held:.0%}" if condition else "No success condition for this prompt"
    took = f"{(time.time() - start) / 60:.1f} minutes" + (" since it was resumed" if args.resume else "")
    found += f"; CLIP reward {rewards.mean():.3f}; {args.episodes} episodes after {steps:,} steps and {took}"
    print(f"{found}. Watch {out}/video.gif and see {out}/curve.png")


def parser() -> argparse.ArgumentParser:
    def add(group, name, meaning, **settings):
        if type(settings.get("default")) in (int, float):  # others say in words what happens without them
            meaning += " (default: %(default)s)"
        group.add_argument(name, help=meaning, **settings)

    def add_clip(group, **several):  # what both commands ask of a CLIP
        meaning = "NAME/TAG from open_clip's list, hf-hub:REPO or local-dir:PATH. Left out: tinyclip, embedded here, "
        meaning += "trained on pictures of this robot, a stand-in and not a zero-shot model"
        add(group, "--model", meaning, default=[EMBEDDED_CLIP] if several else EMBEDDED_CLIP, **several)
        precisions = dict(choices=PRECISIONS, default="fp32")
        add(group, "--precision", "of CLIP's weights. Left out: fp32", **precisions)
        add(group, "--device", "cpu, cuda, cuda:1, ... Left out: cuda where there is one")
        meaning = f"the scene without the goal; several are averaged. Left out: {BASELINE_PROMPT}"
        add(group, "--baseline", meaning, action="append", metavar="PROMPT")

    epilog = "Without a command: train kneeling with the embedded CLIP. Each command has its own --help."
    about = "One sentence in, a trained humanoid out."
    top = argparse.ArgumentParser(prog="vlmrm.py", description=about, epilog=epilog)
    commands = top.add_subparsers(dest="command", metavar="COMMAND", required=True)

    settings = dict(formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    settings |= dict(usage="vlmrm.py train [PROMPT ...] [OPTIONS]", description=inspect.getdoc(train))
    command = commands.add_parser("train", help="train a policy on a sentence", **settings)
    group = command.add_argument_group("the task")
    add(group, "prompt", "the goal in a sentence, or in several to be averaged", nargs="*")
    meaning = "one of the paper's eight, or a combination that tinyclip was never shown: its prompt (unless you give "
    add(group, "--task", meaning + "another) and its success condition. Without a prompt: kneeling", choices=JUDGED)
    add(group, "--alpha", "strength of the projection, from 0 (plain CLIP) to 1", type=float, default=0.5)
    add_clip(command.add_argument_group("the CLIP"))
    group = command.add_argument_group("the scene")
    meaning = "the colours; original is Gymnasium's own. Left out: realistic"
    add(group, "--look", meaning, choices=["realistic", "original"], default="realistic")
    add(group, "--distance", "of the camera, in metres", type=float, default=CAMERA["distance"])
    add(group, "--elevation", "of its gaze, in degrees", type=float, default=CAMERA["elevation"])
    add(group, "--azimuth", "in degrees: 180 sees the front", type=float, default=CAMERA["azimuth"])
    group = command.add_argument_group("learning, by SAC")
    add(group, "--envs", "environments that step together", type=int, default=16)
    for field in fields(sac.Config):
        flag = "--" + field.name.replace("_", "-")
        add(group, flag, field.metadata["help"], type=field.type, default=field.default)
    group = command.add_argument_group("the output")
    add(group, "--episodes", "episodes of the final judgement", type=int, default=100)
    meaning = "folder; left out: runs/TASK-seedN, and in its name any unusual model, alpha, pink, gamma, azimuth"
    add(group, "--out", meaning, type=Path)
    add(group, "--overwrite", "replace a run that is already there", action="store_true")
    meaning = "go on with the interrupted run in this folder, with the settings it was begun with"
    add(group, "--resume", meaning, type=Path, metavar="RUN")

    settings |= dict(usage=None, description=inspect.getdoc(evaluate))
    command = commands.add_parser("evaluate", help="judge rewards before training on them", **settings)
    add(command, "--task", f"of {', '.join(TASKS)}. Left out: all eight", nargs="+", choices=TASKS, metavar="TASK")
    alphas, meaning = [0, 0.25, 0.5, 0.75, 1], "the middle one is drawn where a figure needs one. Left out: "
    add(command, "--alpha", meaning + " ".join(map(str, alphas)), nargs="+", type=float, default=alphas)
    add_clip(command, nargs="+")
    add(command, "--out", "folder of the figures; left out: runs/evaluate", type=Path)
    add(command, "--overwrite", "replace an evaluation that is already there", action="store_true")
    return top


def main(argv: list[str] | None = None):
    argv = list(sys.argv[1:] if argv is None else argv)
    if not argv or argv[0].startswith("-") and not {"train", "evaluate", "-h", "--help"} & set(argv):
        argv.insert(0, "train")
    args = parser().parse_args(argv)
    args.typed = argv
    try:
        (train if args.command == "train" else evaluate)(args)
    except (ValueError, OSError) as error:  # OSError: a full disk, a folder that must not be written
        sys.exit(f"error: {error}")
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and "memory" not in str(error).lower():
            raise
        advice = "use a smaller model, --precision fp16, or smaller --hidden, --batch-size, --buffer-size, --envs"
        sys.exit(f"error: not enough memory ({textwrap.shorten(str(error), 160, placeholder='...')}): {advice}")
    except KeyboardInterrupt:
        sys.exit("interrupted. A training goes on from its last round by train --resume RUN")


if __name__ == "__main__":
    main()
