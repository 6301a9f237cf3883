"""The results on the front page, from finished runs: python benchmarks/results.py runs/*/

Puts into assets/ what a reader needs to check them: runs/NAME.csv (the metrics of a run), runs/results.csv (a row for
each run), gallery.gif (of each of the paper's tasks the seed with the highest CLIP reward, as in the paper; success
has no say) and alpha.png (kneeling by alpha). Prints the tables. It trains nothing.
"""

import argparse
import csv
import json
import shutil
import sys
from collections.abc import Iterable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
import vlmrm
import numpy as np
from PIL import Image, ImageDraw

ASSETS = Path(__file__).parent.parent / "assets"
PAPER = dict(zip(vlmrm.TASKS, (1, 1, 1, 1, 1, 0.64, 0, 0)))  # Table 1: ViT-bigG-14, 10 million steps
COLUMNS = "task alpha seed steps episodes success success_held reward reward_at_the_end reward_of_goal_poses".split()
COLUMNS.append("seconds")


def spread(values: Iterable) -> str:
    """Mean and range: 97% (94-100), or 100% where all are the same."""
    values = [round(100 * value) for value in values]
    return f"{np.mean(values):.0f}%" + f" ({min(values)}-{max(values)})" * (min(values) < max(values))


def print_table(runs: list[dict], ceilings: dict):
    columns = "task | prompt | seeds | success | held | zero action | CLIP reward at the end | of goal poses | ceiling"
    print(f"| {columns} | steps | minutes | the paper's, of another experiment |\n" + "|---" * 12 + "|")
    for task, (prompt, _) in vlmrm.JUDGED.items():
        some = [run for run in runs if run["task"] == task]
        if not some:
            continue
        zero = [run["references"]["zero action"]["success"] for run in some]
        rewards = [
            f"{np.mean([run[key] for run in some]):.3f}" for key in ("reward_at_the_end", "reward_of_goal_poses")
        ]
        ceiling = [f"{float(ceilings[task][key]):.0%}" for key in ("success", "success_held") if task in ceilings]
        minutes = [f"{run['seconds'] / 60:.0f}" for run in some if run["seconds"]]
        cells = [task, prompt, len(some), spread(run["success"] for run in some)]
        cells += [spread(run["success_held"] for run in some), spread(zero), *rewards, " / ".join(ceiling)]
        cells += [f"{max(run['steps'] for run in some):,}", ", ".join(minutes)]
        print("|", " | ".join(map(str, cells)), "|", f"{PAPER[task]:.0%} |" if task in PAPER else " |")


def draw_gallery(runs: list[dict], path: Path):
    """The first episode of each task's best run, as CLIP sees it, eight side by side."""
    size, best = 160, {}
    for run in sorted(runs, key=lambda run: run["reward"]):
        best[run["task"]] = run
    frames = [Image.new("RGB", (4 * size, 2 * size), "white") for _ in range(17)]
    for i, task in enumerate(task for task in vlmrm.TASKS if task in best):
        with Image.open(best[task]["folder"] / "video.gif") as video:
            for k, frame in enumerate(frames):
                video.seek(2 * k)
                view = video.convert("RGB").crop((0, 0, 240, 240)).resize((size, size), Image.Resampling.BICUBIC)
                ImageDraw.Draw(view).text((4, size - 14), f"{task}: {best[task]['success']:.0%}", "black")
                frame.paste(view, (i % 4 * size, i // 4 * size))
    frames[0].save(path, save_all=True, append_images=frames[1:] + frames[-1:] * 5, duration=180, loop=0)


def draw_alphas(runs: list[dict], path: Path):
    """Kneeling by alpha: success, and the steps until an evaluation first succeeds in 80% of its episodes."""
    figure, (left, right) = vlmrm.panels(2, "Kneeling by alpha: a point is a seed, the line their mean", xlabel="alpha")
    alphas = sorted({run["alpha"] for run in runs})
    for run in runs:
        rows = vlmrm.read_metrics(run["folder"] / "metrics.csv")
        run["to80"] = next((row["steps"] for row in rows if row.get("eval_success", 0) >= 0.8), np.nan)
    for axis, key, label, color in (
        (left, "success", "in half of the steps", "C1"),
        (left, "success_held", "held through the last 20", "C2"),
        (right, "to80", "", "C0"),
    ):
        axis.plot([run["alpha"] for run in runs], [run[key] for run in runs], "o", ms=4, alpha=0.5, color=color)
        means = [np.mean([run[key] for run in runs if run["alpha"] == alpha]) for alpha in alphas]
        axis.plot(alphas, means, color=color, label=label)
    left.set(ylabel="success", ylim=(-0.02, 1.02))
    left.legend(fontsize="small")
    for axis in left, right:
        axis.set_xticks(alphas)
    right.set(ylabel="steps to 80% success", ylim=(0, None))
    figure.savefig(path, dpi=100)


def main():
    parser = argparse.ArgumentParser(description="Tables and pictures of finished runs, into assets/.")
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN")
    parser.add_argument("--ceiling", type=Path, default=ASSETS / "runs/ceiling.csv", help="what ceiling.py wrote")
    args = parser.parse_args()
    runs = [json.loads((folder / "result.json").read_text()) | dict(folder=folder) for folder in args.runs]
    runs = sorted((run for run in runs if run["task"]), key=lambda run: (run["task"], run["alpha"], run["seed"]))
    usual = [run for run in runs if run["alpha"] == 0.5]
    (ASSETS / "runs").mkdir(parents=True, exist_ok=True)
    for run in runs:
        shutil.copy(run["folder"] / "metrics.csv", ASSETS / "runs" / f"{run['folder'].name}.csv")
    rows = [{key: run[key] for key in COLUMNS if run[key] is not None} for run in runs]
    vlmrm.write_csv(ASSETS / "runs/results.csv", COLUMNS, rows)
    with open(args.ceiling, newline="") as file:
        print_table(usual, {row["task"]: row for row in csv.DictReader(file)})
    draw_gallery(usual, ASSETS / "gallery.gif")
    if len({run["alpha"] for run in runs}) > 1:
        draw_alphas([run for run in runs if run["task"] == "kneeling"], ASSETS / "alpha.png")


if __name__ == "__main__":
    main()
