"""Judging a reward before training on it: how far is it from "is the goal reached?"

`vlmrm.py evaluate` comes here. Rewards of many different states are compared with the success
conditions, by EPIC distance, correlation, and AUC; nothing is trained.
"""

import argparse
import csv
import itertools
import time
from pathlib import Path

import numpy as np
from evaluation.figures import plot_epic, plot_frames, plot_histograms, plot_paths
from evaluation.states import embed_states, load_states, pose_path
from support.runs import check_free, new_folder, remove_files, short, write_csv
from tqdm import tqdm
from vlmrm import BASELINE_PROMPT, CAMERA, CLIP, TASKS, Scene
from vlmrm import auc, default_device, epic_distance, goal_baseline_reward, measure_states

# Gymnasium's own camera, but it follows the robot in x and y; metres and degrees
ORIGINAL_CAMERA = dict(distance=4.0, elevation=-20, azimuth=90, lookat=(0, 0, 2))
OURS = "textures and camera"
SCENES = {  # look and camera, as in Fig. 3
    "original": ("original", ORIGINAL_CAMERA),
    "textures": ("realistic", ORIGINAL_CAMERA),
    OURS: ("realistic", CAMERA),
}


def evaluate(args: argparse.Namespace):
    """Compares CLIP rewards with success conditions on the fixed states in evaluation/, and leaves
    in runs/evaluate/:

    table.csv    for each model, scene, alpha and task: EPIC distance (0 perfect, .71 unrelated),
                 Pearson correlation, and AUC against all other states and against near misses
                 alone
    epic_*.png   EPIC by alpha, by size of the model, and by scene, the models side by side
    MODEL/paths.png, MODEL/histograms.png, MODEL/frames.png
                 what the reward of one model looks like
    """
    start, device = time.time(), args.device or default_device()
    out, tasks = args.out or Path("runs/evaluate"), list(dict.fromkeys(args.task or TASKS))
    alphas = sorted(set(args.alpha))
    middle = alphas[len(alphas) // 2]  # for figures of one alpha
    models = {short(model): model for model in args.model}
    if len(models) < len(args.model):
        names = ", ".join(args.model)
        advice = "rename a folder, or name each once"
        raise ValueError(f"the models {names} would share a name: {advice}")
    check_free(out, args.overwrite, "table.csv")
    states, origin = load_states()
    goals, near = judge(states)
    paths = paths_to_goals(tasks, states, origin, goals)
    rows = []
    frames = len(SCENES) * len(states) + sum(map(len, paths.values()))  # that each model sees
    with new_folder(out), tqdm(total=len(models) * frames, unit="frame") as bar:
        for name, model in models.items():
            clip = None  # before the next is loaded: a GPU need not hold two
            clip = CLIP(model, device, args.precision)
            size = sum(p.numel() for p in clip.model.visual.parameters())
            baseline = clip.embed_text(args.baseline or [BASELINE_PROMPT])
            goal = {task: clip.embed_text(TASKS[task][0]) for task in tasks}  # (D,) each

            def reward(embeddings, task, alpha):
                r = goal_baseline_reward(embeddings, goal[task], baseline, alpha)
                return r.cpu().numpy()

            # first the few frames: an alpha or a prompt that makes no sense fails here
            curves, scene = {}, Scene(clip.size)
            for task in tasks:
                path = embed_states(clip, scene, paths[task], bar)
                for alpha in alphas:
                    curves[task, alpha] = reward(path, task, alpha)
            seen = {
                key: embed_states(clip, Scene(clip.size, look, camera), states, bar)
                for key, (look, camera) in SCENES.items()
            }
            rewards = {}
            for task, alpha, key in itertools.product(tasks, alphas, SCENES):
                r = reward(seen[key], task, alpha)
                row = dict(model=name, parameters=size, scene=key, alpha=alpha, task=task)
                rows.append(row | scores(r, goals[task], near[task]))
                if alpha == middle and key == OURS:
                    rewards[task] = r
            if name == next(iter(models)):  # there is a result: now an older one may go
                remove_evaluation(out)
            folder, caption = out / name, f"{name}, alpha {middle:g}"
            folder.mkdir(exist_ok=True)
            write_csv(out / "table.csv", rows[0], rows)
            plot_paths(folder / "paths.png", name, paths, curves)
            plot_histograms(folder / "histograms.png", caption, rewards, goals)
            plot_frames(folder / "frames.png", caption, rewards, goals, states)
            plot_epic(out, rows, middle, OURS)
    print_table([row for row in rows if row["scene"] == OURS])
    took = f"{len(states):,} states, {time.time() - start:.0f} seconds"
    print(f"{took}. See the figures and table.csv in {out}/")


def remove_evaluation(out: Path):
    """Removes what an evaluation left in a folder, and nothing else."""
    table = out / "table.csv"
    names = {row.get("model") for row in csv.DictReader(table.open())} if table.exists() else ()
    for folder in (out / name for name in names if name and name == Path(name).name):
        remove_files(folder, "paths.png", "histograms.png", "frames.png")
        if folder.is_dir() and not any(folder.iterdir()) and not folder.is_symlink():
            folder.rmdir()
    remove_files(out, "table.csv", "epic_alpha.png", "epic_size.png", "epic_scene.png")


def judge(states: np.ndarray) -> tuple[dict, dict]:
    """Of states (N, 24), for each task: which meet its condition, and which all but one part of it
    at most, bool (N,)."""
    pose = measure_states(Scene().model, states)
    goals, near = {}, {}
    for task, (_, condition) in TASKS.items():
        parts = np.stack(list(condition(pose).values()))  # bool (parts, N)
        goals[task] = parts.all(0)
        near[task] = parts.sum(0) >= len(parts) - 1
    return goals, near


def paths_to_goals(tasks: list[str], states: np.ndarray, origin: np.ndarray, goals: dict) -> dict:
    """For each task, states (T, 24) from standing to its goal; to standing, from kneeling."""
    model = Scene().model
    example = {task: states[goals[task] & (origin == f"scripted {task}")][0] for task in TASKS}
    begin = {task: example["kneeling" if task == "standing" else "standing"] for task in tasks}
    return {task: pose_path(model, begin[task], example[task]) for task in tasks}


def scores(reward: np.ndarray, goal: np.ndarray, near: np.ndarray) -> dict:
    """How well a reward (N,) tells goal states (N,) from the others, and from near misses."""
    epic = epic_distance(reward, goal)
    pearson = 1 - 2 * epic**2  # of the states' rewards, EPIC is sqrt((1 - pearson) / 2)
    aucs = dict(auc=auc(reward, goal), auc_near=auc(reward[near], goal[near]))
    return dict(epic=epic, pearson=pearson) | aucs


def print_table(rows: list[dict]):
    print("model                     parameters alpha  task            EPIC    AUC   near Pearson")
    line = "{model:24.24} {parameters:11,} {alpha:5g}  {task:14} "
    line += "{epic:5.3f} {auc:6.4f} {auc_near:6.4f} {pearson:7.3f}"
    for row in rows:
        print(line.format(**row))
