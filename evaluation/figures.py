"""The figures of evaluate.py: what a reward looks like, and how far rewards are from the goal."""

from pathlib import Path

import vlmrm  # before mujoco: it chooses how to draw
import numpy as np
from matplotlib.figure import Figure  # not pyplot, which would look for a display
from support.pictures import panels
from vlmrm import TASKS, Scene, render_states


def plot_paths(file: Path, name: str, paths: dict, curves: dict):
    """paths[task]: states (T, 24); curves[task, alpha]: their rewards (T,)."""
    caption = f"{name}: reward along a path of poses that ends in the goal; grey where it is "
    caption += "reached. A good one rises"
    figure, axes = panels(len(paths), caption, xlabel="share of the way", ylabel="reward")
    scene = Scene((96, 96))
    for axis, (task, states) in zip(axes, paths.items()):
        way = np.linspace(0, 1, len(states))
        reached = vlmrm.holds(TASKS[task][1], vlmrm.measure_states(scene.model, states))
        whole_height = axis.get_xaxis_transform()
        axis.fill_between(way, 0, 1, reached, step="mid", color="0.9", transform=whole_height)
        for alpha in [alpha for key, alpha in curves if key == task]:
            color = (0.8 * alpha, 0.3, 0.8 * (1 - alpha))
            axis.plot(way, curves[task, alpha], color=color, label=f"alpha {alpha:g}")
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
            weights = np.full(n, 1 / n)
            axis.hist(r[which], bins, weights=weights, alpha=0.6, label=f"{kind} ({n})")
        axis.set_title(task)
        axis.legend(fontsize="x-small")
    figure.savefig(file, dpi=100)


def plot_frames(file: Path, name: str, rewards: dict, goals: dict, states: np.ndarray):
    """What a reward really likes: the first thing to look at before training on it.

    rewards[task], goals[task]: of all states (N, 24), (N,).
    """
    figure = Figure(figsize=(15, 1.05 * len(rewards) + 0.7), layout="constrained")
    scene = Scene((160, 160), effects=True)
    title = f"{name}: frames (their middle) by reward; green: the goal, by the simulator"
    figure.suptitle(title, parse_math=False)
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
                color = (40, 180, 60) if reached else (0, 0, 0)  # of a frame of 3 pixels
                tile[:3], tile[-3:], tile[:, :3], tile[:, -3:] = color, color, color, color
            axis.imshow(np.concatenate(tiles, 1))
            middles = 59 + 118 * np.arange(len(tiles))
            axis.set(xticks=middles, yticks=[], xticklabels=[f"{x:.2f}" for x in r[which]])
            if row[0].get_subplotspec().is_first_row():
                axis.set_title(kind, fontsize="medium")
    figure.savefig(file, dpi=100)


def plot_epic(out: Path, rows: list[dict], middle: float, ours: str):
    """EPIC against alpha (Fig. 4a), against the number of parameters (Fig. 4b), by scene (Fig. 3).

    rows: as in table.csv. middle, ours: the alpha and the scene of a figure that has only one.
    """

    def named(key):  # in the order of the rows
        return list(dict.fromkeys(row[key] for row in rows))

    def mean(**wanted):  # over the tasks
        return np.mean([row["epic"] for row in rows if wanted.items() <= row.items()])

    tasks, models, scenes = named("task"), named("model"), named("scene")
    over_tasks = f"Mean EPIC distance over {len(tasks)} tasks, alpha {middle:g}"

    caption = "EPIC distance of the reward to the goal, by alpha: 0 is perfect, 0.71 unrelated"
    figure, axes = panels(len(tasks), caption, xlabel="alpha", ylabel="EPIC distance", ylim=(0, 1))
    for axis, task in zip(axes, tasks):
        axis.axhline(0.5**0.5, color="0.7", ls=":")
        axis.set_title(task)
        for model in models:
            wanted = dict(task=task, model=model, scene=ours)
            some = [row for row in rows if wanted.items() <= row.items()]
            alphas, epics = ([row[key] for row in some] for key in ("alpha", "epic"))
            axis.plot(alphas, epics, "o-", ms=3, label=model)
    lines = axes[0].get_legend_handles_labels()
    figure.legend(*lines, loc="outside right center", fontsize="x-small")
    figure.savefig(out / "epic_alpha.png", dpi=100)

    sizes = [next(row["parameters"] for row in rows if row["model"] == model) for model in models]
    epics = [mean(model=model, scene=ours, alpha=middle) for model in models]
    caption = f"{over_tasks}, by model size"
    if len(set(sizes)) > 2:
        correlation = np.corrcoef(np.log(sizes), epics)[0, 1]
        caption += f"; correlation with log size {correlation:.2f}"
    labels = dict(xlabel="parameters of the image tower", ylabel="EPIC distance", xscale="log")
    figure, (axis,) = panels(1, caption, **labels)
    for model, size, epic in zip(models, sizes, epics):
        axis.plot(size, epic, "o", label=model)
    figure.legend(loc="outside right center", fontsize="x-small")
    figure.savefig(out / "epic_size.png", dpi=100)

    caption = f"{over_tasks}, by what CLIP is shown"
    figure, (axis,) = panels(1, caption, ylabel="EPIC distance", ylim=(0, 1))
    width = 0.8 / len(models)
    for i, model in enumerate(models):
        epics = [mean(model=model, scene=scene, alpha=middle) for scene in scenes]
        places = np.arange(len(scenes)) + (i + 0.5) * width - 0.4
        axis.bar(places, epics, width, label=model)
    axis.set_xticks(range(len(scenes)), scenes)
    figure.legend(loc="outside right center", fontsize="x-small")
    figure.savefig(out / "epic_scene.png", dpi=100)
