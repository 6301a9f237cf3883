"""To be skipped at a first reading. Curves and videos of a training."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import vlmrm
from gymnasium.envs.mujoco.mujoco_rendering import MujocoRenderer
from matplotlib import rcParams
from matplotlib.figure import Figure  # not pyplot, which would look for a screen
from matplotlib.font_manager import FontProperties, findfont, fontManager, get_font
from PIL import Image

from support.runs import atomic_open


def panels(count: int, caption: str, **labels) -> tuple[Figure, np.ndarray]:
    """A captioned figure with `count` panels, up to four in a row."""
    across, down = min(count, 4), -(-count // 4)
    figure = Figure(figsize=(max(3.4 * across, 6.8), 3 * down + 0.9), layout="constrained")
    fonts, missing = fonts_for(caption)
    if missing:
        caption += f"\n(no installed font has {len(missing)} of its letters)"
    caption = caption.replace("$", r"\$")  # no formula
    figure.suptitle(caption, fontsize="medium", wrap=True, family=fonts)
    axes = figure.subplots(down, across, squeeze=False).ravel()
    for axis in axes[count:]:
        axis.set_axis_off()
    for axis in axes[:count]:
        axis.set(**labels)
    return figure, axes[:count]


def fonts_for(text: str) -> tuple[list[str], str]:
    """Families of fonts that have a text's letters, the usual first, and the letters that none has.

    Installed fonts are looked at in turn until all letters are found.
    """
    families = list(rcParams["font.family"])
    missing = {letter for letter in text if letter.isprintable() and not letter.isspace()}
    missing -= glyphs(findfont(FontProperties(family=families)))
    for font in fontManager.ttflist if missing else ():
        last = font.name.startswith("Last Resort")  # whose letters are boxes
        found = set() if last else missing & glyphs(font.fname)
        if found:
            families, missing = [*families, font.name], missing - found
        if not missing:
            break
    return families, "".join(sorted(missing))


def glyphs(file: str) -> set[str]:
    """The letters that a font can draw."""
    try:
        font = get_font(file)
        return {chr(code) for code in font.get_charmap()} if font.scalable else set()
    except (OSError, RuntimeError):  # gone, or of a kind that matplotlib cannot read
        return set()


def plot_curve(rows: list[dict], prompt: str, goal_reward: float | None, path: Path):
    """CLIP reward beside success. Where only the first rises, the policy hacks the reward.

    rows: of metrics.csv. goal_reward: of goal poses; None for a sentence without a condition.
    """
    evaluated = [row for row in rows if "eval_reward" in row]
    labels = dict(xlabel="environment steps", ylabel="mean CLIP reward of a step")
    figure, (left,) = panels(1, f'"{prompt}"', **labels)
    right = left.twinx()
    right.set(ylabel="success rate, judged from the simulator", ylim=(-0.02, 1.02))
    for axis, key, style, some, label in (
        (left, "reward", "#b3d1e7", rows, "CLIP reward while exploring"),
        (left, "eval_reward", "C0o-", evaluated, "CLIP reward of the deterministic policy"),
        (right, "eval_success", "C1o-", evaluated, "success (half of the steps)"),
        (right, "eval_success_held", "C1:", evaluated, "success (held through the last 20)"),
    ):
        steps, values = [row["steps"] for row in some], [row[key] for row in some]
        axis.plot(steps, values, style, ms=3, label=label)
    if goal_reward is None:
        right.remove()
    else:
        label = "CLIP reward of a goal pose at every step"
        left.axhline(goal_reward, color="C0", ls=":", label=label)
    figure.legend(loc="outside lower center", ncols=2, fontsize="small")
    with atomic_open(path) as file:
        figure.savefig(file, dpi=120)


def record_video(
    act: Callable,
    camera: dict,
    look: str,
    path: Path,
    steps: int = 100,
    episodes: int = 3,
    seed: int = 3 * 10**9,
):
    """A GIF of whole episodes at half of real speed: CLIP's view, and one from further round.

    act: observations (1, O) -> actions (1, A) in [-1, 1].
    """
    side = camera | dict(azimuth=camera["azimuth"] - 65)
    views = [vlmrm.Scene((240, 240), look, view, effects=True) for view in (camera, side)]
    env, frames = vlmrm.Humanoid(views[0]), []
    for episode in range(episodes):
        obs, _ = env.reset(seed=seed + episode)
        for i in range(steps):
            if i % 3 == 0:
                pair = [view.render(env.data) for view in views]
                frames.append(Image.fromarray(np.concatenate(pair, 1)))
            obs = env.step(env.action_space.high * act(obs[None])[0])[0]
    with atomic_open(path) as file:  # 3 steps of 15 ms are shown for 90 ms
        frames[0].save(file, "GIF", save_all=True, append_images=frames[1:], duration=90, loop=0)


def show_window(act: Callable, camera: dict, episodes: int, seed: int, steps: int = 100):
    """Episodes in a window of Gymnasium's, in which the mouse moves the camera. Needs a screen."""
    env = vlmrm.Humanoid(vlmrm.Scene(effects=True))
    window = MujocoRenderer(env.model, env.data, camera)
    for episode in range(episodes):
        obs, _ = env.reset(seed=seed + episode)
        for _ in range(steps):
            window.render("human")
            obs = env.step(env.action_space.high * act(obs[None])[0])[0]
    window.close()
