"""Does scale make better rewards? Asked of CLIPs like the embedded one, made in less time:

    python evaluation/scaling.py

    bodies      from how many bodies does a CLIP learn to judge a robot that it never saw? 1, 4, 16,
                64, 256, 500, with equally many frames and steps for each
    width       and how wide does its image tower have to be? Four widths, of 500 bodies
    grading     and what is graded truth worth? The same without it, by yes and no; and with the
                mean of a sentence's parts alone, and their product alone

Each model is trained anew, with two seeds (gradings: with one), on frames of 64 x 64 pixels to save
time, and judged on the fixed states of evaluation/ with alpha 0.5: the mean of the eight tasks' AUC
against near misses, and of their EPIC distances. Beside them is the embedded CLIP, which learned
much longer. Leaves scaling.csv and scaling.png in assets/evaluate; each row is written when its
model is done, and not made again.
"""

import argparse
import csv
import json
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
import vlmrm  # before mujoco: it chooses how to draw
import numpy as np
import torch
from evaluation.evaluate import judge, scores
from evaluation.states import load_states
from matplotlib.figure import Figure
from support.runs import write_csv
from tinyclip import grading, make

ASSETS = Path(__file__).parent.parent / "assets/evaluate"
BODIES, WIDTHS, USUAL = (1, 4, 16, 64, 256, 500), (4, 8, 12, 16), 8
SIZE = 64  # pixels
POINTS = dict(textcoords="offset points", fontsize=9, color="0.4")
GRADINGS = {  # the shares of nearness and of the product in tinyclip/grading.py
    "as it is": (grading.NEARNESS, grading.PRODUCT),
    "yes or no": (0, 1),
    "mean alone": (grading.NEARNESS, 0),
    "product alone": (grading.NEARNESS, 1),
}


def judged(clip: vlmrm.CLIP) -> dict:
    """The means over the eight tasks of what evaluate.py calls a reward's scores."""
    states, _ = load_states()
    goals, near = judge(states)
    frames = vlmrm.render_states(vlmrm.Scene(clip.size), states)
    seen = torch.cat([clip.embed_images(part) for part in np.array_split(frames, 20)])
    baseline, rows = clip.embed_text(vlmrm.BASELINE_PROMPT), []
    for task, (prompt, _) in vlmrm.TASKS.items():
        reward = vlmrm.goal_baseline_reward(seen, clip.embed_text(prompt), baseline, 0.5)
        rows.append(scores(reward.numpy(), goals[task], near[task]))
    return {name: float(np.mean([row[name] for row in rows])) for name in rows[0]}


def plot(rows: list[dict], embedded: dict, file: Path):
    figure = Figure(figsize=(10, 6), layout="constrained")
    figure.suptitle("Judging a robot that was in no picture: the mean of eight tasks, each seed")
    names = dict(bodies="bodies in training", parameters="parameters of the image tower")
    measures = dict(auc_near="AUC against near misses", epic="EPIC distance (0: perfect)")
    axes = figure.subplots(2, 2, sharex="col", sharey="row")
    for row, (measure, title) in zip(axes, measures.items()):
        for axis, (x, name) in zip(row, names.items()):
            some = [r for r in rows if r["grading"] == "as it is"]
            some = [r for r in some if r["width" if x == "bodies" else "bodies"] == usual(x)]
            axis.plot([r[x] for r in some], [r[measure] for r in some], "o", alpha=0.5)
            values = sorted({r[x] for r in some})
            means = [np.mean([r[measure] for r in some if r[x] == value]) for value in values]
            axis.plot(values, means)
            axis.axhline(embedded[measure], color="0.5", linestyle=":")
            above = 4 if measure == "epic" else -12  # points
            axis.annotate("the embedded CLIP", (values[0], embedded[measure]), (0, above), **POINTS)
            axis.set(xscale="log", xlabel=name if measure == "epic" else "", ylabel=title)
            axis.set_xticks(values, [f"{value:,}" for value in values])
            axis.minorticks_off()
            axis.label_outer()
    figure.savefig(file, dpi=100)


def usual(x: str) -> int:
    """What stays the same in the curve along x: the width, or the number of bodies."""
    return USUAL if x == "bodies" else BODIES[-1]


def main():
    parser = argparse.ArgumentParser(
        description="How good are smaller CLIPs, and CLIPs of fewer bodies?",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--frames", type=int, default=16_000, help="of all bodies together")
    parser.add_argument("--steps", type=int, default=600, help="of each training")
    parser.add_argument("--seeds", type=int, default=2, help="trainings of each kind")
    parser.add_argument("--out", type=Path, default=ASSETS, help="folder of table and figure")
    args, rows = parser.parse_args(), []
    table = args.out / "scaling.csv"
    if table.exists():
        with open(table, newline="") as file:
            rows = [
                {k: v if k == "grading" else json.loads(v) for k, v in row.items()}
                for row in csv.DictReader(file)
            ]
    done = {tuple(row[key] for key in ("bodies", "width", "grading", "seed")) for row in rows}
    for seed in range(args.seeds):
        for bodies in BODIES:
            kinds = [(bodies, USUAL, "as it is", seed)]
            if bodies == BODIES[-1]:
                kinds += [(bodies, width, "as it is", seed) for width in WIDTHS if width != USUAL]
                kinds += [(bodies, USUAL, name, seed) for name in GRADINGS if seed == 0]
            kinds = [kind for kind in dict.fromkeys(kinds) if kind not in done]
            if kinds:
                frames, pose = make.make_data(bodies, args.frames // bodies, SIZE, seed)
            for _, width, name, _ in kinds:
                start, folder = time.time(), args.out / "model"
                grading.NEARNESS, grading.PRODUCT = GRADINGS[name]
                config = make.architecture(width, SIZE)
                model = make.train(frames, pose, config, args.steps, seed)
                make.save(model, config, folder)
                clip = vlmrm.CLIP(f"local-dir:{folder}", "cpu")
                size = sum(p.numel() for p in clip.model.visual.parameters())
                row = dict(bodies=bodies, width=width, grading=name, parameters=size, seed=seed)
                row |= dict(frames=len(frames), steps=args.steps) | judged(clip)
                for file in folder.iterdir():
                    file.unlink()
                folder.rmdir()
                rows.append(row)
                write_csv(table, rows[0], rows)
                print(f"{row} {time.time() - start:.0f} s", flush=True)
    grading.NEARNESS, grading.PRODUCT = GRADINGS["as it is"]
    plot(rows, judged(vlmrm.CLIP(device="cpu")), args.out / "scaling.png")


if __name__ == "__main__":
    main()
