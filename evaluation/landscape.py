"""The paper's Figure 2, for any CLIP: is there a slope to climb in two classic control tasks?

    python evaluation/landscape.py --model RN50/openai ViT-L-14/laion2b_s32b_b82k

A row of three panels for each model: the reward of CartPole's frames over the angle of the pole,
that of MountainCar's over the place of the car, and the same with MountainCar in colours, more like
a photograph. A curve for each alpha; a good one rises to the dotted line, where the goal is. In the
paper, CartPole's does, and MountainCar's only in colours.

The embedded CLIP knows neither cars nor poles: this needs a real one. The environments draw
themselves with pygame. Leaves landscape.png and landscape.csv in runs/.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
import vlmrm
import gymnasium
import numpy as np
from matplotlib.figure import Figure
from support.runs import short, write_csv

CARTPOLE = "pole vertically upright on top of the cart", "pole and cart"
CAR = "a car at the peak of the mountain, next to the yellow flag", "a car in the mountain"


def cartpole_frames(angles: np.ndarray) -> np.ndarray:
    """With the pole at angles (N,) in radians from upright -> frames, uint8 (N, H, W, 3)."""
    env = gymnasium.make("CartPole-v1", render_mode="rgb_array").unwrapped
    env.reset(seed=0)
    frames = []
    for angle in angles:
        env.state = 0, 0, angle, 0  # the cart's place and speed, the pole's angle and speed
        frames.append(square(env.render()))
    return np.stack(frames)


def car_frames(places: np.ndarray, colours: bool) -> np.ndarray:
    """With the car at places (N,) from -1.2 to 0.6 -> frames, uint8 (N, H, W, 3)."""
    env = gymnasium.make("MountainCar-v0", render_mode="rgb_array").unwrapped
    env.reset(seed=0)
    frames = []
    for place in places:
        env.state = place, 0  # the car's place and speed
        frames.append(square(env.render()))
    return np.stack([coloured(frame) for frame in frames] if colours else frames)


def square(frame: np.ndarray) -> np.ndarray:
    """(H, W, 3) -> (W, W, 3), with more of its top. Most CLIPs cut off what is left and right of a
    square, and there is the flag."""
    height, width = frame.shape[:2]
    return np.pad(frame, ((width - height, 0), (0, 0), (0, 0)), mode="edge")


def coloured(frame: np.ndarray) -> np.ndarray:
    """MountainCar's frame, which is white with black lines, with a sky and a meadow.

    (H, W, 3) -> the same.
    """
    height, width = frame.shape[:2]
    # as env.render draws the mountain: places -1.2 to 0.6 over the width, heights by a sine
    places = np.linspace(-1.2, 0.6, width)
    line = height - (np.sin(3 * places) * 0.45 + 0.55) * width / 1.8  # (W,) its row
    rows = np.arange(height)[:, None]
    down = rows / height  # (H, 1)
    sky = np.array([90, 150, 225]) + down[..., None] * np.array([110, 80, 25])
    noise = np.random.default_rng(0).normal(0, 14, (height, width, 1))  # grass
    grass = np.array([70, 125, 50]) + noise - 30 * down[..., None]
    ground = np.where((rows > line)[..., None], grass, sky)
    white = (frame > 250).all(-1, keepdims=True)
    return np.where(white, ground.clip(0, 255), frame).astype(np.uint8)


def main():
    parser = argparse.ArgumentParser(
        description="The paper's Figure 2: rewards over the pole's angle and the car's place.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--model", nargs="+", required=True, help="as in vlmrm.py evaluate")
    add("--alpha", nargs="+", type=float, default=[0, 0.5, 1], help="a curve for each")
    add("--angle", type=float, default=0.25, help="largest of the pole, rad; beyond 0.21 it fell")
    add("--points", type=int, default=61, help="of a curve")
    add("--precision", default="fp32", help="of CLIP's weights")
    add("--device", default=vlmrm.default_device(), help="cpu, cuda, ...")
    add("--out", type=Path, default=Path("runs"), help="folder of table and figure")
    args = parser.parse_args()
    angles = np.linspace(-args.angle, args.angle, args.points)
    places = np.linspace(-1.2, 0.6, args.points)
    panels = {  # prompts, what is varied, where the goal is, frames
        "CartPole, angle of the pole": (CARTPOLE, angles, 0, cartpole_frames(angles)),
        "MountainCar, place of the car": (CAR, places, 0.5, car_frames(places, False)),
        "the same in colours": (CAR, places, 0.5, car_frames(places, True)),
    }
    count = len(args.model)
    args.out.mkdir(parents=True, exist_ok=True)
    figure, table = Figure(figsize=(12, 4.5 * count), layout="constrained"), []
    rows = figure.subplots(2 * count, 3, height_ratios=[4, 1] * count)
    for model, axes, strips in zip(args.model, rows[::2], rows[1::2]):
        clip = vlmrm.CLIP(model, args.device, args.precision)
        for (name, (prompts, xs, goal, frames)), axis, strip in zip(panels.items(), axes, strips):
            state = clip.embed_images(frames)
            g, b = (clip.embed_text(prompt) for prompt in prompts)
            for alpha in args.alpha:
                rewards = vlmrm.goal_baseline_reward(state, g, b, alpha).cpu().numpy()
                color = (0.8 * alpha, 0.3, 0.8 * (1 - alpha))
                axis.plot(xs, rewards, color=color, label=f"alpha {alpha:g}")
                row = dict(model=model, panel=name, alpha=alpha)
                table += [row | dict(x=x, reward=r) for x, r in zip(xs, rewards)]
            axis.axvline(goal, color="0.5", linestyle=":")
            axis.set(title=f"{short(model)}\n{name}", ylabel="reward")
            some = frames[np.linspace(0, len(frames) - 1, 5).astype(int)]
            strip.imshow(np.concatenate(list(some), 1))
            strip.axis("off")
        axes[0].legend(fontsize="small")
        del clip  # before the next one is loaded
        figure.savefig(args.out / "landscape.png", dpi=100)  # what is done is kept
        write_csv(args.out / "landscape.csv", table[0], table)
    print(f"See {args.out}/landscape.png")


if __name__ == "__main__":
    main()
