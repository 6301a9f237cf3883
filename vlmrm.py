"""One sentence in, a trained humanoid out: vision-language models as zero-shot reward models.

A reward function usually has to be programmed. Here it is a sentence, such as "a humanoid robot
kneeling": a frozen CLIP compares it with the rendered frame of each time step, and how well the
two match is the reward. This file is the method:

    1. the reward     equations (2) and (3), functions of embeddings
    2. CLIP           embeddings of pictures and of sentences; equation (1), their reward
    3. the scene      from the simulator's state to the picture that CLIP sees
    4. the tasks      sentences, and for each a judge that reads the simulator, never CLIP
    5. EPIC           equation (4): is a reward worth training on?
    6. training       all of it together; how SAC learns is in sac.py, the file to read next
    7. elsewhere      the same reward for any Gymnasium environment
    8. more tasks     sentences and judges beyond the paper's
    9. drawing        what OpenGL asks for; to be skipped

    python vlmrm.py                              # learns to kneel
    python vlmrm.py "a humanoid robot bowing"    # or whatever the sentence says
    python vlmrm.py --help                       # all that the command line can do

Left to itself it uses the *embedded CLIP*, a small one that comes with this repository and runs
on any machine. It never saw this robot, its scene or its camera: it was trained on pictures of
other bodies. But it knows nothing except their poses, in some 170 phrases, unlike the real CLIPs
that --model names.

Sections 1 and 2 begin with their own imports and can be copied into other code. Name a model there,
or copy tinyclip/ as well.

The method is by Rocamonde, Montesinos, Nava, Perez and Lindner, "Vision-Language Models are
Zero-Shot Reward Models for Reinforcement Learning", ICLR 2024, arXiv:2310.12921. Numbers of
equations, tables, figures and appendices are that paper's.
"""

# --------------------------------------------------------------------------------------------------
# 1. The reward: functions of embeddings that need torch alone. `state` is the embedding of a
# state's picture, psi(s) in the paper; `goal` and `baseline` are embeddings of sentences. In the
# formulas, s, g and b are these three at norm 1.

import torch
import torch.nn.functional as F
from torch import Tensor


def clip_reward(state: Tensor, goal: Tensor) -> Tensor:
    """Equation (2): the cosine between a picture's embedding and that of the task's sentence.

    state (B, D), goal (D,), of any norm -> (B,) in [-1, 1]. Raises ValueError for other shapes,
    and for an embedding that is zero, NaN or infinite.
    """
    s, g = unit_vectors(state, goal)
    return s @ g  # (B,)


def goal_baseline_reward(state: Tensor, goal: Tensor, baseline: Tensor, alpha: float) -> Tensor:
    """Equation (3), Definition 1: the goal-baseline regularized reward.

    A picture's embedding says much that has nothing to do with the task: floor, sky, style. What
    the task changes is taken to lie along L, the line through a baseline sentence ("a humanoid
    robot") and the goal ("a humanoid robot kneeling"). What lies off L counts as floor, sky and
    style. So the embedding is moved towards its projection on L: not at all if alpha is 0, all the
    way if it is 1. The nearer it then is to the goal, the higher the reward:

        R(s) = 1 - |alpha proj_L s + (1 - alpha) s - g|^2 / 2

    Two sentences may not say everything about a task. Alpha 1 loses what of it lies off L. Which
    alpha is best has to be tried.

    state (B, D), goal (D,), baseline (D,), of any norm; alpha in [0, 1]. Returns (B,), at most 1.
    Raises ValueError where clip_reward does, for alpha outside [0, 1], and if goal and baseline are
    the same, unless alpha is 0.
    """
    if not 0 <= alpha <= 1:
        raise ValueError(f"alpha is {alpha}; it has to be in [0, 1]")
    s, g, b = unit_vectors(state, goal, baseline)  # (B, D), (D,), (D,)
    line = g - b  # (D,) the direction of L
    if alpha > 0 and line.norm() < 1e-6:
        raise ValueError("goal and baseline are the same: there is no line L. Or use alpha 0")
    # (B,) 0 at b, 1 at g. The clamp is for alpha 0, with which g = b is allowed
    along = (s - b) @ line / line.square().sum().clamp(min=1e-12)
    proj = b + along.unsqueeze(-1) * line  # (B, D) proj_L s
    # For unit vectors, 1 - |s - g|^2 / 2 is their cosine: with alpha 0 this is equation (2).
    return 1 - 0.5 * (alpha * proj + (1 - alpha) * s - g).square().sum(-1)  # (B,)


def unit_vectors(state: Tensor, *sentences: Tensor) -> list[Tensor]:
    """Embeddings of pictures (B, D) and of sentences, (D,) each, scaled to norm 1."""
    if state.ndim != 2 or any(sentence.shape != state.shape[1:] for sentence in sentences):
        shapes = [tuple(x.shape) for x in (state, *sentences)]
        raise ValueError(f"embeddings are {shapes}; they have to be (B, D) and (D,)")
    units = [F.normalize(x, dim=-1) for x in (state, *sentences)]
    if not all((x.norm(dim=-1) > 0.99).all() for x in units):  # also false for NaN
        raise ValueError("an embedding is zero, NaN or infinite. With fp16, try fp32")
    return units


# --------------------------------------------------------------------------------------------------
# 2. CLIP: two networks, one for pictures and one for sentences, trained together on captioned
# pictures until a picture and its caption lie close in one space. Here both are frozen: nothing
# below trains them. With section 1, this needs torch, open_clip and numpy.

import contextlib
import difflib
import importlib.util
import os
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path

import numpy as np

# OpenGL that draws on a CPU loads a library, LLVM. triton, which open_clip imports, brings another
# version of it, and crashes if it meets OpenGL's, unless it is told to keep to its own.
if sys.platform == "linux" and "libLLVM" in Path("/proc/self/maps").read_text():
    flags = sys.getdlopenflags()
    sys.setdlopenflags(flags | os.RTLD_DEEPBIND)
    with contextlib.suppress(ImportError):  # there is no triton without CUDA
        import triton._C.libtriton  # noqa: F401
    sys.setdlopenflags(flags)
import open_clip

EMBEDDED_CLIP = "tinyclip"  # the folder beside this file. It never saw this robot: tinyclip/README
BASELINE_PROMPT = "a humanoid robot"  # the scene without the goal


class CLIP:
    """Any open_clip model, with its own preprocessing of pictures and its own tokenizer.

    model: "NAME/TAG" of open_clip.list_pretrained(), such as "ViT-B-32/laion2b_s34b_b79k", which is
    downloaded once; "hf-hub:REPO"; "local-dir:PATH", a folder with open_clip_config.json and
    weights; or "tinyclip", the embedded one. device: left out, a GPU where there is one. precision:
    "fp32", or to halve the memory "fp16" or "bf16". Raises ValueError if it cannot be loaded.
    """

    def __init__(
        self, model: str = EMBEDDED_CLIP, device: str | None = None, precision: str = "fp32"
    ):
        self.device = device or default_device()
        self.name, self.precision = model, precision
        self.model, self.tokenizer = load_open_clip(model, self.device, precision)
        self.model.eval().requires_grad_(False).to(memory_format=torch.channels_last)  # faster
        self.dtype = open_clip.get_input_dtype(precision) or torch.float32
        config = self.model.visual.preprocess_cfg  # what pictures this model was trained on
        size = config["size"]
        self.size = (size, size) if isinstance(size, int) else tuple(size)  # (h, w) in pixels
        self.resize_mode, self.interpolation = config["resize_mode"], config["interpolation"]
        self.mean = torch.tensor(config["mean"], device=self.device).view(3, 1, 1)
        self.std = torch.tensor(config["std"], device=self.device).view(3, 1, 1)

    def __reduce__(self):  # to be sent to another process, which loads it again
        return CLIP, (self.name, self.device, self.precision)

    @torch.no_grad()
    def embed_images(self, frames: np.ndarray | Tensor, batch_size: int = 64) -> Tensor:
        """Frames, uint8 (B, H, W, 3) -> unit vectors (B, D), float32.

        Raises ValueError for frames of another type or shape, and if there is none.
        """
        check_frames(frames)
        batches = [frames[i : i + batch_size] for i in range(0, len(frames), batch_size)]
        embeddings = [self.model.encode_image(self.preprocess(batch)) for batch in batches]
        return F.normalize(torch.cat(embeddings).float(), dim=-1)

    def preprocess(self, frames: np.ndarray | Tensor) -> Tensor:
        """uint8 (B, H, W, 3) -> (B, 3, h, w) on the device, as this model was trained to see it."""
        if isinstance(frames, np.ndarray):
            frames = torch.from_numpy(np.ascontiguousarray(frames))  # torch takes no flipped views
        x = frames.to(self.device).permute(0, 3, 1, 2).float()  # (B, 3, H, W) in 0..255
        if x.shape[-2:] != self.size:  # frames of the scene below have the model's own size
            x = resize(x, self.size, self.resize_mode, self.interpolation)
        return ((x / 255 - self.mean) / self.std).to(self.dtype)

    @torch.no_grad()
    def embed_text(self, prompts: str | list[str]) -> Tensor:
        """A sentence, or several whose unit vectors are averaged -> a unit vector (D,), float32.

        Raises ValueError for an empty sentence, and for one that this CLIP would cut off.
        """
        prompts = [prompts] if isinstance(prompts, str) else list(prompts)  # P of them
        check_prompts(prompts, self.tokenizer)
        tokens = self.tokenizer(prompts).to(self.device)  # (P, number of tokens)
        embeddings = self.model.encode_text(tokens).float()  # (P, D)
        return F.normalize(F.normalize(embeddings, dim=-1).mean(0), dim=-1)


class VLMReward:
    """Equation (1): a function from frames psi(s) to rewards, VLM(l, psi(s), c).

    The task l is the goal prompt, the context c the baseline prompt and alpha. Called on frames,
    uint8 (B, H, W, 3), it returns rewards (B,), float32, by equation (3). A prompt may be a list of
    sentences, whose embeddings are averaged. With alpha 0, the baseline may be left out.
    """

    def __init__(
        self,
        clip: CLIP,
        goal_prompt: str | list[str],
        baseline_prompt: str | list[str] | None = None,
        alpha: float = 0.5,
    ):
        if baseline_prompt is None and alpha > 0:
            raise ValueError("give a baseline_prompt: the scene without the goal. Or use alpha 0")
        self.clip, self.alpha = clip, alpha
        self.goal = clip.embed_text(goal_prompt)  # (D,) once for all
        context = goal_prompt if baseline_prompt is None else baseline_prompt
        self.baseline = clip.embed_text(context)  # (D,)
        self(np.zeros((1, *clip.size, 3), np.uint8))  # a mistake fails now, not in an hour

    def __call__(self, frames: np.ndarray | Tensor) -> np.ndarray:
        state = self.clip.embed_images(frames)  # (B, D)
        return goal_baseline_reward(state, self.goal, self.baseline, self.alpha).cpu().numpy()


# What follows up to section 3 is about open_clip, not about the method.


def default_device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def check_frames(frames: np.ndarray | Tensor):
    """Raises ValueError unless they are uint8 (B, H, W, 3), and at least one."""
    dtype, shape = str(getattr(frames, "dtype", type(frames))), np.shape(frames)
    uint8 = dtype in ("uint8", "torch.uint8")
    if not uint8 or len(shape) != 4 or shape[3] != 3 or 0 in shape:
        raise ValueError(f"frames are {dtype} {shape}; they have to be uint8 (B, H, W, 3)")


def check_prompts(prompts: list[str], tokenizer: Callable):
    """Raises ValueError unless all are sentences that this CLIP reads to their end."""
    if not prompts or not all(isinstance(prompt, str) and prompt.strip() for prompt in prompts):
        raise ValueError(f"the prompt is {prompts}: write a sentence, like {BASELINE_PROMPT!r}")
    length = tokenizer(prompts).shape[1]  # open_clip cuts off silently what is longer
    # Tokenize again with room to spare. Beyond `length` there should be padding alone, all of it
    # the same token as in the last column.
    beyond = tokenizer(prompts, context_length=4 * length)[:, length:]  # (P, 3 * length)
    if (beyond != beyond[:, -1:]).any():
        longest = max(prompts, key=len)
        raise ValueError(f"the prompt exceeds {length} tokens, all CLIP reads: {longest[:40]}...")


def load_open_clip(model: str, device: str, precision: str) -> tuple:
    """An open_clip model and its tokenizer, by a name as in CLIP. Raises ValueError if it fails."""
    if not isinstance(model, str) or precision not in ("fp32", "fp16", "bf16"):
        wanted = "the model is given by its name, the precision is fp32, fp16 or bf16"
        raise ValueError(f"model is {model!r}, precision {precision!r}: {wanted}")
    if model == EMBEDDED_CLIP:
        name, tag = f"local-dir:{Path(__file__).parent / EMBEDDED_CLIP}", None
    elif model.startswith(("hf-hub:", "local-dir:")):
        name, tag = model.replace("local-dir:~", f"local-dir:{Path.home()}", 1), None
    else:
        name, _, tag = model.partition("/")
        known = ["/".join(entry) for entry in open_clip.list_pretrained()]
        if model not in known:
            near = ", ".join(difflib.get_close_matches(model, known, 3, 0.3)) or "none"
            near = f"local-dir:{model}" if Path(model).expanduser().is_dir() else near
            raise ValueError(f"open_clip knows no model {model!r}; nearest: {near}")
    try:
        torch.zeros(1, device=device)  # no such device? Say so before a download
        config = open_clip.get_model_config(name) or {}
        text = config.get("text_cfg", {})
        needed = text.get("hf_model_name") or text.get("hf_tokenizer_name")
        if needed and importlib.util.find_spec("transformers") is None:
            raise ImportError(f"it reads text by {needed}: pip install transformers")
        # Weights were trained with one of two activation functions. open_clip's list knows which,
        # but only warns where the architecture says the other.
        quick_gelu = bool(tag) and open_clip.get_pretrained_cfg(name, tag).get("quick_gelu", False)
        # Half precision keeps some layers in fp32. In CoCa models and in those with a text tower
        # from Hugging Face, the layers would then not fit together: "pure" casts all of them.
        if "multimodal_cfg" in config or "hf_model_name" in text:
            precision = precision if precision == "fp32" else f"pure_{precision}"
        return open_clip.create_model(
            name,
            tag,
            precision=precision,
            device=device,
            force_quick_gelu=quick_gelu,
            require_pretrained=True,
        ), open_clip.get_tokenizer(name)
    except Exception as error:  # a hub has many ways to be out of reach, each with its own
        first = error
        while first.__cause__ or first.__context__:  # what led to it says more
            first = first.__cause__ or first.__context__
        lines = (textwrap.shorten(str(e), 160, placeholder="...") for e in (error, first))
        raise ValueError(
            f"cannot load {model} on {device} ({', from: '.join(dict.fromkeys(lines))}). Are there "
            "such a device and model? A download that was cut off goes on if you try again. "
            "Without network, use local-dir:PATH, or the embedded model"
        ) from error


def resize(x: Tensor, size: tuple[int, int], mode: str, interpolation: str) -> Tensor:
    """(B, 3, H, W) -> (B, 3, h, w), as open_clip does it for single images, but in batches.

    Values differ from open_clip's by at most 1 of 255. mode: "squash" to h x w; or keep the
    proportions and crop ("shortest") or pad ("longest").
    """
    (H, W), (h, w) = x.shape[-2:], size
    if mode == "squash":
        height, width = h, w
    elif mode == "shortest":  # covers h x w; rounded down
        height, width = (h, W * h // H) if w * H <= h * W else (H * w // W, w)
    else:  # fits into h x w; rounded to the nearest
        ratio = max(H / h, W / w)
        height, width = round(H / ratio), round(W / ratio)
    for step in (H, width), (height, width):  # like Pillow: along x, then y, to whole grey levels
        x = F.interpolate(x, step, mode=interpolation, antialias=True).round().clamp(0, 255)
    if mode == "shortest":
        top, left = round((height - h) / 2), round((width - w) / 2)
        return x[..., top : top + h, left : left + w]
    top, left = (h - height) // 2, (w - width) // 2
    return F.pad(x, (left, w - width - left, top, h - height - top))


# --------------------------------------------------------------------------------------------------
# 3. The scene: psi(s), the picture of a state. In the paper, kneeling's success rose from 36% to
# 100% with realistic textures and a camera that shows the robot's height (Fig. 3, App. C.2).
#
# Five words of MuJoCo: a *spec* is a scene that can be edited. Compiled, it is a *model*, which
# never changes. *Data* is what changes: joints' positions qpos, and computed from them the places
# (xpos) and axes (xmat) of bodies. A *body* is a rigid part, a *geom* a shape of it, which is drawn
# and collides.

import contextlib
import functools
import os
import sys
from collections.abc import Iterator
from typing import NamedTuple

if sys.platform == "linux" and not os.environ.get("DISPLAY"):  # without a screen
    os.environ["MUJOCO_GL"] = os.environ.get("MUJOCO_GL") or "egl"  # MuJoCo reads it when imported

CANNOT_DRAW = "cannot draw. On Linux, begin with MUJOCO_GL=egl python ... (that needs EGL: apt-get "
CANNOT_DRAW += "install libegl1 libgl1-mesa-dri); or set MUJOCO_GL to glfw or osmesa"
try:
    import mujoco  # after torch and open_clip: the other order can crash them
except Exception as error:
    problem = SystemExit if __name__ == "__main__" else ImportError
    raise problem(f"error: {CANNOT_DRAW} ({error})") from error
import gymnasium
from gymnasium.envs.mujoco.humanoid_v5 import HumanoidEnv

HUMANOID = Path(gymnasium.__file__).parent / "envs/mujoco/assets/humanoid.xml"
CAMERA = dict(distance=3.5, elevation=-10.0, azimuth=180.0, lookat=(0, 0, 1))  # m, degrees
PALE, DARK, ORANGE = (0.86, 0.88, 0.90, 1), (0.20, 0.22, 0.26, 1), (0.93, 0.45, 0.13, 1)  # rgba
# The robot's parts, as they are called in humanoid.xml, without left_ and right_.
PAINT = dict.fromkeys(["torso1", "head", "butt", "shin1", "larm"], PALE)
PAINT |= dict.fromkeys(["uwaist", "lwaist", "thigh1", "uarm1"], DARK)
PAINT |= dict.fromkeys(["foot", "hand"], ORANGE)


class Scene:
    """Gymnasium's humanoid in a scene, and a camera that follows it over the floor.

    size: (height, width) of the frames in pixels, or one number for both. look: "realistic" (the
    paper's word, our own textures), or "original" for Gymnasium's own colours. camera: by default
    where the paper has it. effects: shadows, reflections and smooth edges, for people. CLIP does
    without them (tried with the embedded one alone), and drawing is faster. How the robot moves is
    the same in all.
    """

    def __init__(
        self,
        size: tuple[int, int] | int = (96, 96),
        look: str = "realistic",
        camera: dict = CAMERA,
        effects: bool = False,
    ):
        size = tuple(map(int, np.broadcast_to(size, 2)))
        if not 0 < min(size) <= max(size) <= 16384:
            raise ValueError(f"size is {size}; wanted are 1 to 16384 pixels, (height, width)")
        if look not in ("realistic", "original"):
            raise ValueError(f'look is {look!r}; it has to be "realistic" or "original"')
        spec = mujoco.MjSpec.from_file(str(HUMANOID))
        if look == "realistic":
            paint(spec)
        if not effects:
            simplify(spec)
        spec.visual.global_.offheight, spec.visual.global_.offwidth = size
        self.model, self.size, self.effects = spec.compile(), size, effects
        self.settings = size, look, camera, effects
        self.renderer = None  # opened at the first frame
        # MuJoCo's own way to follow a body sinks and rises with it, which hides its height. So the
        # camera is a free one, and `render` moves it along the floor.
        self.camera = mujoco.MjvCamera()
        for name, value in camera.items():
            setattr(self.camera, name, value)

    def __reduce__(self):  # to be sent to another process, which has an OpenGL of its own
        return Scene, self.settings

    def render(self, data: mujoco.MjData) -> np.ndarray:
        """The picture of a state: uint8 (height, width, 3). Raises ValueError without OpenGL."""
        mujoco.mj_kinematics(self.model, data)  # where the bodies are, from the joints' angles
        mujoco.mj_camlight(self.model, data)  # and the light
        self.camera.lookat[:2] = data.qpos[:2]
        with opengl():  # section 9
            self.renderer = self.renderer or open_renderer(self)
            self.renderer.update_scene(data, self.camera)
            return self.renderer.render()


def paint(spec: mujoco.MjSpec):
    """Realistic textures: pale and dark parts, orange hands and feet, tiles, a sky."""
    for texture in spec.textures:
        if texture.type == mujoco.mjtTexture.mjTEXTURE_SKYBOX:
            texture.rgb1, texture.rgb2 = (0.75, 0.85, 0.95), (0.30, 0.50, 0.75)
        elif texture.name == "texplane":
            texture.rgb1, texture.rgb2 = (0.55, 0.52, 0.48), (0.62, 0.59, 0.55)
            texture.mark, texture.markrgb = mujoco.mjtMark.mjMARK_EDGE, (0.45, 0.42, 0.40)
    for geom in spec.geoms:
        if geom.name != "floor":
            part = geom.name.removeprefix("left_").removeprefix("right_")
            geom.material, geom.rgba = "", PAINT[part]
    spec.geom("floor").rgba, spec.material("MatPlane").reflectance = (1, 1, 1, 1), 0.1
    light = spec.lights[0]
    light.dir, light.diffuse, light.ambient = (-0.5, 0.3, -1), (0.7,) * 3, (0.25,) * 3


def simplify(spec: mujoco.MjSpec):
    """Leaves out what costs time: several samples a pixel, fine facets, a floor of many tiles."""
    quality, floor, tiles = spec.visual.quality, spec.geom("floor"), spec.material("MatPlane")
    quality.offsamples, quality.numslices, quality.numstacks = 0, 8, 6
    floor.size = (5, 5, 0.125)  # as drawn; as an obstacle, a plane has no end
    tiles.texrepeat = [repeat / 4 for repeat in tiles.texrepeat]  # of the same size as before


def each_state(model: mujoco.MjModel, states: np.ndarray) -> Iterator[mujoco.MjData]:
    """The simulator, put into one state after the other: the same object each time.

    states (N, 24): MuJoCo's qpos, which is the torso's place (3) and orientation (4), and the
    angles of 17 joints. Raises ValueError for other shapes, for NaN, and if there is none.
    """
    shape = np.shape(states)
    if len(shape) != 2 or shape[1] != model.nq or not shape[0] or not np.isfinite(states).all():
        raise ValueError(f"states are {shape}; they have to be (N, {model.nq}), finite, not empty")
    data = mujoco.MjData(model)
    for qpos in states:
        data.qpos[:] = qpos
        yield data


def render_states(scene: Scene, states: np.ndarray) -> np.ndarray:
    """qpos (N, 24), as in each_state -> frames, uint8 (N, height, width, 3)."""
    frames = np.empty((len(states), *scene.size, 3), np.uint8)
    for i, data in enumerate(each_state(scene.model, states)):
        frames[i] = scene.render(data)
    return frames


# --------------------------------------------------------------------------------------------------
# 4. The tasks of Tables 1 to 3. A policy can please CLIP without doing what the sentence says. So
# CLIP, which taught it, cannot judge it. The paper's authors watched videos instead. Here the judge
# is a condition on where the body's parts are. Nothing is learned from it.


class Pose(NamedTuple):
    """Where the body is, in metres, as seen from the floor under the pelvis.

    x is where the pelvis faces, y is left, z is up. Pairs are (left, right). The leading dimensions
    "..." are none for one pose, (N,) for N of them.
    """

    up: np.ndarray  # (..., 3) the torso's upward axis: its z is 1 upright, 0 lying, -1 head down
    facing: np.ndarray  # (..., 3) the torso's forward axis: its z is 1 face up
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
    torso = data.body("torso").xmat.reshape(3, 3)  # its columns: forward, left, up
    pelvis = data.body("pelvis").xmat.reshape(3, 3)
    # Which way is the robot turned? Its left side tells, unless it lies on a side. Its front would
    # not where it lies on its back or face.
    left = pelvis[:2, 1] / max(np.linalg.norm(pelvis[:2, 1]), 1e-6)
    forward = left[1], -left[0]
    turn = np.array([[*forward, 0], [*left, 0], [0, 0, 1]])  # its rows are x, y, z
    origin = [*data.body("pelvis").xpos[:2], 0]

    def points(kind, *names):  # kind: data.geom or data.body
        return (np.array([kind(name).xpos for name in names]) - origin) @ turn.T

    return Pose(
        up=turn @ torso[:, 2],
        facing=turn @ torso[:, 0],
        head=points(data.geom, "head")[0],
        pelvis=points(data.body, "pelvis")[0],
        # a limb's body begins at its upper joint: the upper arm's place is the shoulder
        shoulders=points(data.body, "left_upper_arm", "right_upper_arm"),
        elbows=points(data.body, "left_lower_arm", "right_lower_arm"),
        hands=points(data.geom, "left_hand", "right_hand"),
        hips=points(data.body, "left_thigh", "right_thigh"),
        knees=points(data.body, "left_shin", "right_shin"),
        feet=points(data.geom, "left_foot", "right_foot"),
    )


def measure_states(model: mujoco.MjModel, states: np.ndarray) -> Pose:
    """qpos (N, 24), as in each_state -> one Pose of N: each of its arrays is (N, ...)."""
    poses = [measure(model, data) for data in each_state(model, states)]
    return Pose(*(np.stack(values) for values in zip(*poses)))


# A condition takes a Pose and returns named parts, bool (...) each. The goal is where all of them
# hold. Where all but one hold is a near miss (evaluation/ asks if a reward can tell it apart).
Condition = Callable[[Pose], dict[str, np.ndarray]]

X, Y, Z = 0, 1, 2
SIDES = np.array([1, -1])  # y * SIDES: how far outwards, for a (left, right) pair
# When the robot stands, its pelvis is 0.87 m high and its head 1.48 m. Radii: head 0.09 m, foot
# 0.075 m, knee 0.05 m.


def holds(condition: Condition, p: Pose) -> np.ndarray:
    """Whether a pose is the goal: bool (...)."""
    return np.logical_and.reduce(list(condition(p).values()))


def upright(p: Pose) -> np.ndarray:
    return p.up[..., Z] > 0.7  # the torso leans by at most 45 degrees or so


def lotus(p: Pose) -> dict:
    """Seated, both knees on the floor, turned out and not behind; the feet further in than they."""
    out = p.knees[..., Y] * SIDES  # (..., 2)
    return {
        "seated upright": upright(p) & (p.pelvis[..., Z] < 0.32),
        "knees on the floor": (p.knees[..., Z] < 0.16).all(-1) & (p.knees[..., X] > -0.05).all(-1),
        "knees outwards": (out > 0.18).all(-1),
        "feet inwards": (out - p.feet[..., Y] * SIDES > 0.05).all(-1)
        & (np.abs(p.feet[..., X]) < 0.30).all(-1),
    }


def kneeling(p: Pose) -> dict:
    """Both knees on the floor, not far apart, shins behind them, upright, and not seated."""
    return {
        "upright": upright(p),
        "knees on the floor": (p.knees[..., Z] < 0.11).all(-1),
        "shins behind": (p.knees[..., X] - p.feet[..., X] > 0.15).all(-1),
        "knees near the middle": (np.abs(p.knees[..., Y]) < 0.30).all(-1),
        "not seated": (p.pelvis[..., Z] > 0.22) & ~holds(lotus, p),
    }


def standing(p: Pose) -> dict:
    """On both feet, legs nearly straight, torso upright."""
    return {
        "torso upright": p.up[..., Z] > 0.8,
        "at full height": p.pelvis[..., Z] > 0.80,
        "both feet down": (p.feet[..., Z] < 0.13).all(-1),
    }


def splits(p: Pose) -> dict:
    """Upright on the floor, both legs straight along it, each over 45 degrees to its own side."""
    leg, thigh, shin = p.feet - p.hips, p.knees - p.hips, p.feet - p.knees
    lengths = np.linalg.norm(thigh, axis=-1) * np.linalg.norm(shin, axis=-1)
    return {
        "upright": upright(p),
        "on the floor": (p.pelvis[..., Z] < 0.22) & (p.feet[..., Z] < 0.25).all(-1),
        "legs straight": ((thigh * shin).sum(-1) > 0.87 * lengths).all(-1),  # bent < 30 degrees
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
    """Each hand within 15 cm of its side of the pelvis, at most 8 cm lower, elbows further out."""
    side = p.pelvis[..., None, :] + np.array([[0, 0.2, 0], [0, -0.2, 0]])  # (..., 2, 3)
    near = np.linalg.norm(p.hands - side, axis=-1) < 0.15
    high = p.hands[..., Z] > p.pelvis[..., Z, None] - 0.08
    elbows_out = (p.elbows - p.hands)[..., Y] * SIDES > 0
    return {"hands on the hips": (near & high & elbows_out).all(-1)}


def crossed(p: Pose) -> dict:
    """Forearms really crossed in front of the chest: each hand past the middle, beyond its elbow.

    It is measured along the torso's axes: the arms turn with the torso, not with the pelvis.
    """
    axes = np.stack([p.facing, np.cross(p.up, p.facing), p.up], -1)  # (..., 3, 3) x, y, z
    middle = p.shoulders.mean(-2, keepdims=True)
    hands, elbows = (p.hands - middle) @ axes, (p.elbows - middle) @ axes  # (..., 2, 3)
    low = (p.pelvis[..., None, :] - middle) @ axes + 0.1  # (..., 1, 3)
    past = (hands[..., Y] * SIDES < -0.04) & ((elbows - hands)[..., Y] * SIDES > 0)
    in_front = (hands[..., X] > 0.05) & (hands[..., Z] > low[..., Z]) & (hands[..., Z] < 0.05)
    level = np.abs(hands[..., 0, Z] - hands[..., 1, Z]) < 0.2
    return {"forearms crossed": past.all(-1), "before the chest": in_front.all(-1) & level}


def both(body: Condition, arms: Condition) -> Condition:
    """The goal of both. The body is one part: a wrong body with these arms is a near miss."""
    return functools.partial(parts_of_both, body, arms)  # can be sent to another process


def parts_of_both(body: Condition, arms: Condition, p: Pose) -> dict:
    return {body.__name__: holds(body, p)} | arms(p)


TASKS: dict[str, tuple[str, Condition]] = {  # name: (goal prompt, success condition)
    "kneeling": ("a humanoid robot kneeling", kneeling),
    "lotus": ("a humanoid robot seated down, meditating in the lotus position", lotus),
    "standing": ("a humanoid robot standing up", standing),
    "arms-raised": ("a humanoid robot standing up, with both arms raised", both(standing, raised)),
    "splits": ("a humanoid robot practicing gymnastics, doing the side splits", splits),
    "hands-on-hips": ("a humanoid robot standing up with hands on hips", both(standing, on_hips)),
    "one-leg": ("a humanoid robot standing up on one leg", one_leg),
    "arms-crossed": (
        "a humanoid robot standing up, with its arms crossed",
        both(standing, crossed),
    ),
}


def success_rates(success: np.ndarray) -> tuple[float, float]:
    """Whether the condition held at each step of some episodes (episodes, steps) -> two shares.

    The paper's rule, the share of episodes in which it held in at least half of the steps; and the
    share in which it held in each of the last 20, which says whether the robot stays so. NaN where
    there was no condition. Raises ValueError for other shapes.
    """
    success = np.asarray(success, dtype=float)
    if success.ndim != 2 or not success.size:
        raise ValueError(f"success is {success.shape}; it has to be (episodes, steps), not empty")
    if np.isnan(success).any():
        return float("nan"), float("nan")
    return float((success.mean(1) >= 0.5).mean()), float(success[:, -20:].all(1).mean())


# --------------------------------------------------------------------------------------------------
# 5. EPIC, the Equivalent-Policy Invariant Comparison (Gleave et al. 2021): how far is a reward from
# the true one, which is 1 where the goal is reached, else 0? Answered on many states, before
# anything is trained (evaluation/ does it on 3,340). `auc` asks in another way: does a goal state
# earn more?


def epic_distance(reward_a: np.ndarray, reward_b: np.ndarray, gamma: float = 0.99) -> float:
    """Equation (4), Definition 2: D = sqrt(1 - rho) / sqrt(2), rho the correlation of two rewards.

    What leaves the best policies as they are should not count: a factor above 0, a shift, and
    potential shaping, which adds gamma phi(s') - phi(s) to a reward R(s, a, s'), for any function
    phi of states. Rewards that differ by these alone have distance 0; unrelated ones have 0.71,
    opposite ones 1. (Not the other way round: rewards may be far apart and have the same best
    policies.)

        goal = holds(kneeling, measure_states(scene.model, states))
        epic_distance(reward_fn(render_states(scene, states)), goal)

    Both have the same shape. Rewards of states alone, as here, are (N,). For these there is no
    shaping to take out: that would only subtract a constant (Lemma 1). Small finite problems may
    have (n, m, n) instead, the rewards R(s, a, s') of n states and m actions, and a discount gamma
    in [0, 1]; canonically_shaped, below, takes the shaping out. Raises ValueError for other shapes,
    for NaN, and for a reward that is constant, or nothing but shaping.
    """
    a, b = (np.asarray(reward, dtype=np.float64) for reward in (reward_a, reward_b))
    if a.shape != b.shape or a.ndim not in (1, 3) or a.shape[0] != a.shape[-1]:
        shapes = f"{a.shape} and {b.shape}"
        raise ValueError(f"rewards of shapes {shapes}; they have to be both (N,) or (n, m, n)")
    if not a.size or not np.isfinite([a, b]).all() or not 0 <= gamma <= 1:
        raise ValueError(f"rewards that are empty, NaN or infinite, or gamma is {gamma}")
    a, b = (x / (np.abs(x).max() or 1) for x in (a, b))  # so that no square overflows
    if a.ndim == 3:
        a, b = canonically_shaped(a, gamma), canonically_shaped(b, gamma)
    a, b = a - a.mean(), b - b.mean()
    length_a, length_b = np.linalg.norm(a), np.linalg.norm(b)
    if min(length_a, length_b) < 1e-12:
        raise ValueError("a reward is constant here: its correlation with another is undefined")
    # For unit vectors |a - b|^2 = 2 - 2 rho: D is half of their distance, and precise near rho = 1.
    return float(np.linalg.norm(a / length_a - b / length_b) / 2)


def canonically_shaped(reward: np.ndarray, gamma: float) -> np.ndarray:
    """C(R), beneath equation (4): takes out potential shaping.

    R(s, a, s') + E[gamma R(s', A, S') - R(s, A, S') - gamma R(S, A, S')], where states S and S' and
    the action A are drawn uniformly. reward (n, m, n) -> (n, m, n).
    """
    mean = reward.mean((1, 2))  # (n,) E[R(s, A, S')] of each s
    of_next, of_state, of_all = gamma * mean, mean[:, None, None], gamma * mean.mean()  # s', s, all
    return reward + of_next - of_state - of_all


def auc(reward: np.ndarray, goal: np.ndarray) -> float:
    """Area under the ROC curve: how often a goal state earns more than one that is no goal.

    A tie counts half.

    reward (N,) and goal, bool (N,), of N states. NaN where all are goals, or none. Raises
    ValueError for other shapes or types, and for NaN rewards.
    """
    reward, goal = np.asarray(reward), np.asarray(goal)
    fits = reward.ndim == 1 and reward.shape == goal.shape and goal.dtype == bool
    if not fits or reward.dtype.kind not in "biuf" or np.isnan(reward).any():
        given = f"{reward.dtype} {reward.shape} and {goal.dtype} {goal.shape}"
        raise ValueError(f"rewards and goals are {given}; they have to be (N,), without NaN, bool")
    if goal.all() or not goal.any():
        return float("nan")
    ours, others = reward[goal][:, None], reward[~goal]  # (goals, 1), (others,): every pair
    return float((ours > others).mean() + 0.5 * (ours == others).mean())


# --------------------------------------------------------------------------------------------------
# 6. Training. The policy never sees a picture: it acts on what Gymnasium's humanoid observes of
# itself, 348 numbers such as angles, velocities and forces. The picture goes to CLIP alone, and
# what CLIP says of it is the reward. SAC (sac.py) learns from observations, actions and rewards.

from gymnasium.vector import AutoresetMode, SyncVectorEnv, VectorEnv, VectorWrapper
from gymnasium.wrappers import TimeLimit

import sac

if not hasattr(sac, "rollout"):
    raise ImportError(f"{__file__} needs the sac.py beside it, but {sac.__file__} comes first")


class Humanoid(HumanoidEnv):
    """Gymnasium's Humanoid-v5 in a Scene. No posture ends an episode.

    If there is a condition, info["success"] says whether it holds.
    """

    def __init__(self, scene: Scene, condition: Condition | None = None):
        self.scene, self.condition = scene, condition  # first, since the next line asks for it
        super().__init__(terminate_when_unhealthy=False, render_mode="rgb_array")

    def _initialize_simulation(self):  # Gymnasium loads a model here
        return self.scene.model, mujoco.MjData(self.scene.model)

    def do_simulation(self, ctrl: np.ndarray, n_frames: int):
        super().do_simulation(ctrl, n_frames)
        # A step of MuJoCo leaves xpos one step behind qpos; drawing or judging brings it up to
        # date. So it is done always: Gymnasium's reward must not depend on whether someone looks.
        mujoco.mj_kinematics(self.model, self.data)

    def step(self, action: np.ndarray) -> tuple:
        # The reward is Gymnasium's, for walking. sac.rollout puts CLIP's in its place.
        observation, reward, terminated, truncated, _ = super().step(action)
        info = {}
        if self.condition is not None:
            info["success"] = bool(holds(self.condition, measure(self.model, self.data)))
        return observation, reward, terminated, truncated, info

    def render(self) -> np.ndarray:
        return self.scene.render(self.data)


def make_envs(
    scene: Scene, condition: Condition | None = None, count: int = 16, episode_steps: int = 100
) -> VectorEnv:
    """`count` humanoids that share a scene. An episode of 100 steps lasts 1.5 seconds."""
    # DISABLED: an environment whose episode ended waits for a reset, which sac.rollout gives it.
    makers = [lambda: TimeLimit(Humanoid(scene, condition), episode_steps)] * count
    return SyncVectorEnv(makers, autoreset_mode=AutoresetMode.DISABLED)


def prepare(
    reward_fn: VLMReward,
    config: sac.Config,
    condition: Condition | None = None,
    scene: Scene | None = None,
    count: int = 16,
) -> tuple[sac.SAC, sac.Player]:
    """An untrained agent, and a player that plays its rounds: sac.train takes both.

    scene: left out, one with frames of the size that this CLIP reads. count: environments that
    step together.
    """
    envs = make_envs(scene or Scene(reward_fn.clip.size), condition, count, config.round_steps)
    spaces = envs.single_observation_space, envs.single_action_space
    agent = sac.SAC(*spaces, config, reward_fn.clip.device)
    return agent, sac.Player(envs, reward_fn, config)


def train(
    goal_prompt: str,
    baseline_prompt: str = BASELINE_PROMPT,
    alpha: float = 0.5,
    clip: CLIP | None = None,
    **settings,
) -> Iterator[dict]:
    """VLM-RM from a sentence to a policy: yields what was measured, after each round of episodes.

    clip: left out, the embedded one. settings: those of sac.Config, such as steps or seed.

        for row in train("a humanoid robot kneeling"):
            print(row)

    A row is that of sac.train, with success by the paper's rule: NaN for a sentence that has no
    condition. To keep the policy, call `prepare` and sac.train as is done here. The command line
    (support/training.py) does the same, and more around it: files, workers, a progress bar.
    """
    reward_fn = VLMReward(clip or CLIP(), goal_prompt, baseline_prompt, alpha)
    judges = {prompt: condition for prompt, condition in JUDGED.values()}  # section 8 has them all
    condition = judges.get(goal_prompt)  # None for any other sentence
    agent, player = prepare(reward_fn, sac.Config(**settings), condition)
    for row in sac.train(agent, player):
        for key in {"success", "eval_success"} & row.keys():
            row[key] = success_rates(row[key])[0]
        yield row


# --------------------------------------------------------------------------------------------------
# 7. Elsewhere: the same reward for other environments, and for whatever algorithm learns in them.


class VLMRewardWrapper(gymnasium.Wrapper, gymnasium.utils.RecordConstructorArgs):
    """Any Gymnasium environment that draws itself, rewarded for the frame after each step.

    reward_fn: frames, uint8 (B, H, W, 3) -> rewards (B,), such as a VLMReward. The environment's
    own reward moves to info["env_reward"]. Raises ValueError unless render_mode is "rgb_array".
    """

    def __init__(self, env: gymnasium.Env, reward_fn: Callable):
        # by this, Gymnasium's env.spec can make the wrapped environment again
        gymnasium.utils.RecordConstructorArgs.__init__(self, reward_fn=reward_fn)
        super().__init__(env)
        self.reward_fn = reward_fn
        self.metadata = env.metadata | {"render_modes": ["rgb_array"]}
        if env.render_mode != "rgb_array":
            given = f"render_mode is {env.render_mode!r}"
            raise ValueError(f'{given}; make the environment with render_mode="rgb_array"')

    def step(self, action: np.ndarray) -> tuple:
        obs, env_reward, terminated, truncated, info = self.env.step(action)
        (reward,) = sac.label(self.reward_fn, self.render()[None])  # checks what it returns
        return obs, float(reward), terminated, truncated, info | {"env_reward": env_reward}

    def render(self) -> np.ndarray:
        return draw(self.env)


class VLMRewardVectorWrapper(VectorWrapper):
    """The same for a vector environment: the frames of all N are labelled by one call.

    Raises ValueError unless render_mode is "rgb_array", and metadata["autoreset_mode"] NEXT_STEP or
    DISABLED: in SAME_STEP, the frame after an episode's last step already shows the next episode.
    """

    def __init__(self, env: VectorEnv, reward_fn: Callable):
        super().__init__(env)
        self.reward_fn, self.mode = reward_fn, env.metadata.get("autoreset_mode")
        self.ended = np.zeros(env.num_envs, bool)  # which episodes ended in the step before
        known = AutoresetMode.NEXT_STEP, AutoresetMode.DISABLED
        if env.render_mode != "rgb_array" or self.mode not in known:
            given = f"render_mode is {env.render_mode!r}, autoreset_mode {self.mode}"
            raise ValueError(f"{given}; wanted are rgb_array, and NEXT_STEP or DISABLED")

    def reset(self, **settings) -> tuple:
        self.ended[:] = False
        return self.env.reset(**settings)

    def step(self, actions: np.ndarray) -> tuple:
        obs, env_rewards, terminated, truncated, info = self.env.step(actions)
        rewards = sac.label(self.reward_fn, np.stack(self.render()))  # (N,)
        if self.mode == AutoresetMode.NEXT_STEP:
            rewards[self.ended] = 0  # this step only began a new episode
        self.ended = terminated | truncated
        return obs, rewards, terminated, truncated, info | {"env_reward": env_rewards}

    def render(self) -> tuple[np.ndarray, ...]:
        alone = isinstance(self.env.unwrapped, SyncVectorEnv)  # all in this process
        return tuple(map(draw, self.env.unwrapped.envs)) if alone else self.env.render()


def draw(env: gymnasium.Env) -> np.ndarray:
    """env.render(), beside other code that draws. Gymnasium's renderer expects to be alone."""
    renderer = getattr(env.unwrapped, "mujoco_renderer", None)
    with opengl() if renderer else contextlib.nullcontext():
        if renderer and renderer.viewer:
            renderer.viewer.make_context_current()
        frame = env.render()
    if not isinstance(frame, np.ndarray) or frame.ndim != 3:
        given = type(frame).__name__
        raise ValueError(f"render() gives {given}; wanted is a frame, an array (H, W, 3)")
    return frame


# --------------------------------------------------------------------------------------------------
# 8. More sentences that have a judge. They are not the paper's.


def squatting(p: Pose) -> dict:
    """On both feet with the knees well bent, upright, neither on the knees nor seated."""
    thigh, shin = p.hips - p.knees, p.feet - p.knees
    lengths = np.linalg.norm(thigh, axis=-1) * np.linalg.norm(shin, axis=-1)
    return {
        "upright": p.up[..., Z] > 0.72,
        "both feet down": (p.feet[..., Z] < 0.13).all(-1),
        "knees bent": ((thigh * shin).sum(-1) > -0.34 * lengths).all(-1),  # by 70 degrees or more
        "knees up": (p.knees[..., Z] > 0.2).all(-1),
        "low, not seated": (p.pelvis[..., Z] > 0.27) & (p.pelvis[..., Z] < 0.65),
    }


def sitting(p: Pose) -> dict:
    """Upright on the floor, both legs straight along it, each less than 30 degrees from forward."""
    leg, parts = p.feet - p.hips, splits(p)
    parts.pop("legs to the sides")
    return parts | {"legs forward": (leg[..., X] > 1.73 * np.abs(leg[..., Y])).all(-1)}


def one_raised(p: Pose) -> dict:
    """One hand above the top of the head, the other below its shoulder."""
    above = p.hands[..., Z] > p.head[..., Z, None] + 0.09
    below = p.hands[..., Z] < p.shoulders[..., Z]
    return {"a hand above the head": above.any(-1), "the other down": below.any(-1)}


def arms_out(p: Pose) -> dict:
    """Each hand at least 40 cm outwards of its shoulder, and within 25 cm of its height.

    Outwards of the torso, as in `crossed`. A straight arm reaches 62 cm.
    """
    hand, leftward = p.hands - p.shoulders, np.cross(p.up, p.facing)[..., None, :]
    outwards = (hand * leftward).sum(-1) * SIDES > 0.4
    return {"hands out to the sides": (outwards & (np.abs(hand[..., Z]) < 0.25)).all(-1)}


# Not the paper's: two poses at once. The embedded CLIP was trained on pictures of each, never both.
COMPOSITIONS: dict[str, tuple[str, Condition]] = {
    "kneeling-arms-raised": (
        "a humanoid robot kneeling, with both arms raised",
        both(kneeling, raised),
    ),
    "kneeling-hands-on-hips": (
        "a humanoid robot kneeling with hands on hips",
        both(kneeling, on_hips),
    ),
    "lotus-arms-raised": (
        "a humanoid robot in the lotus position, with both arms raised",
        both(lotus, raised),
    ),
    "splits-arms-raised": (
        "a humanoid robot doing the side splits, with both arms raised",
        both(splits, raised),
    ),
    "splits-arms-crossed": (
        "a humanoid robot doing the side splits, with its arms crossed",
        both(splits, crossed),
    ),
    "squatting-arms-crossed": (
        "a humanoid robot squatting, with its arms crossed",
        both(squatting, crossed),
    ),
}
# Not the paper's either. Of each of these, the embedded CLIP has seen pictures.
OTHERS: dict[str, tuple[str, Condition]] = {
    "kneeling-one-arm-raised": (
        "a humanoid robot kneeling, with one arm raised",
        both(kneeling, one_raised),
    ),
    "arms-out": (
        "a humanoid robot standing up, with its arms out to the sides",
        both(standing, arms_out),
    ),
    "sitting": ("a humanoid robot sitting with straight legs", sitting),
    "squatting": ("a humanoid robot squatting", squatting),
}
JUDGED = TASKS | COMPOSITIONS | OTHERS


# --------------------------------------------------------------------------------------------------
# 9. Drawing beside other code that draws. This is about OpenGL, not about the method.


def open_renderer(scene: Scene) -> mujoco.Renderer:
    try:
        renderer = mujoco.Renderer(scene.model, *scene.size)
    except Exception as error:
        raise ValueError(f"{CANNOT_DRAW} ({' '.join(str(error).split())[:99]})") from error
    for flag in (mujoco.mjtRndFlag.mjRND_SHADOW, mujoco.mjtRndFlag.mjRND_REFLECTION):
        renderer.scene.flags[flag] = scene.effects
    return renderer


DREW = set()  # the processes that have drawn; a fork inherits it


@contextlib.contextmanager
def opengl() -> Iterator[None]:
    """What draws in here leaves OpenGL as it was. Raises ValueError in a fork, which would hang.

    OpenGL works on one context at a time, the current one. Were ours left current, other code that
    does not choose its own would draw, or delete, in ours.
    """
    if DREW and os.getpid() not in DREW:
        how = 'AsyncVectorEnv(..., context="spawn"), with a Scene made in each process'
        raise ValueError(f"drawing hangs in a fork of a process that drew. Use spawn: {how}")
    DREW.add(os.getpid())
    if getattr(getattr(mujoco, "GLContext", None), "__module__", "") != "mujoco.egl":
        yield  # with other libraries it is left as it is
        return
    from mujoco import egl

    gl = egl.EGL
    context, display = gl.eglGetCurrentContext(), gl.eglGetCurrentDisplay()
    surface = gl.eglGetCurrentSurface(gl.EGL_DRAW)
    try:
        yield
    finally:
        if context:
            gl.eglMakeCurrent(display, surface, surface, context)
        elif egl.EGL_DISPLAY:
            nothing = gl.EGL_NO_SURFACE, gl.EGL_NO_SURFACE, gl.EGL_NO_CONTEXT
            gl.eglMakeCurrent(egl.EGL_DISPLAY, *nothing)


if __name__ == "__main__":
    from support.command_line import main

    main()
