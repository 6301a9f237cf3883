"""The tables of results, from finished runs: python benchmarks/results.py RUN ...

Adds to assets/ what a reader needs to check them: runs/NAME.csv (the metrics of a run) and a row in
runs/results.csv, which replaces that of the same task, settings, steps and seed. Prints the table
of all rows. It trains nothing. In a row, "settings" are the flags by which the run differs from
today's defaults. So a change of a default asks for new words in the older rows.

--policies also keeps in policies/, for `vlmrm.py play TASK`, the policy of each task's best seed:
of those given, with the usual settings, the one with the highest CLIP reward, as in the paper;
success has no say. --gallery draws assets/gallery.gif, of the best run of each task. --alphas draws
assets/alpha.png (kneeling by alpha, from the rows and their metrics). --parts lets the policies of
the runs act once more, and prints how often each holds the legs and arms of which task.
"""

import argparse
import csv
import json
import shlex
import shutil
import sys
import zlib
from collections.abc import Iterable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
import vlmrm
import sac
import numpy as np
import torch
from PIL import Image, ImageDraw
from support import command_line
from support.pictures import panels
from support.runs import load_policy, read_metrics, save_small_policy, short, write_csv

ASSETS = Path(__file__).parent.parent / "assets"
RUNS = ASSETS / "runs"
# Table 1: ViT-bigG-14, 10 million steps
PAPER = dict(zip(vlmrm.TASKS, (1, 1, 1, 1, 1, 0.64, 0, 0)))
COLUMNS = "task settings model alpha seed steps".split()
COLUMNS += "episodes success success_held reward reward_at_the_end reward_of_goal_poses".split()
COLUMNS += "success_zero success_random success_untrained seconds".split()
# columns of their own, or of the machine
NO_SETTINGS = "task seed steps episodes out overwrite resume device workers command".split()

PARTS = vlmrm.kneeling, vlmrm.lotus, vlmrm.standing, vlmrm.splits
PARTS += vlmrm.raised, vlmrm.on_hips, vlmrm.crossed


def unusual(config: dict) -> str:
    """The flags of `train` that differ from its defaults, but for NO_SETTINGS.

    config: a run's config.json.
    """
    usual = vars(command_line.parser().parse_args(["train"]))
    usual |= dict(prompt=[vlmrm.JUDGED[config["task"]][0]], baseline=[vlmrm.BASELINE_PROMPT])
    words = []
    for key in (key for key in usual if key not in NO_SETTINGS):
        value = config.get(key, usual[key])  # older runs lack some
        if value != usual[key]:
            flag = [] if key == "prompt" else [f"--{key.replace('_', '-')}"]
            for part in value if isinstance(value, list) else [value]:
                words += [*flag, part if isinstance(part, str) else f"{part:.10g}"]
    return shlex.join(words)


def name_of(row: dict) -> str:
    settings = row.get("settings", "")
    words = [short(word.removeprefix("--")) for word in shlex.split(settings)]
    if len(settings) > 100:  # too much for a file's name
        words = [f"{zlib.crc32(settings.encode()):08x}"]
    words = [row["task"], *words, f"steps{row['steps']:.0f}", f"seed{row['seed']:g}"]
    return "-".join(words).replace(" ", "-")


def read(path: Path) -> list[dict]:
    """The rows of a CSV file, numbers as numbers; none if there is no such file."""
    if not path.exists():
        return []
    with open(path, newline="") as file:
        if "look" in file.readline():
            raise SystemExit(f"{path} is older than 0.6.2: remove it, and add its runs anew")
        file.seek(0)
        words = "task", "settings", "model"
        return [
            {k: v if k in words else float(v) for k, v in row.items() if v}
            for row in csv.DictReader(file)
        ]


def spread(values: Iterable) -> str:
    """Mean and range: 97% (94-100), or 100% where all are the same."""
    values = [round(100 * value) for value in values]
    least, most = min(values), max(values)
    return f"{np.mean(values):.0f}%" + f" ({least}-{most})" * (least < most)


def print_table(rows: list[dict]):
    """A row for each task and its settings: means over the seeds, and in brackets the range."""
    columns = "task | prompt | seeds | steps | success | held | success and held of the best seed "
    columns += "by CLIP reward | CLIP reward at the end; of goal poses | zero action | the paper's "
    columns += "success, of another experiment (ViT-bigG-14)"
    print(f"| {columns} |\n" + "|---" * 10 + "|")
    groups = {}
    for row in (row for row in rows if row["task"] in vlmrm.JUDGED):
        groups.setdefault((row["task"], row.get("settings", ""), row["steps"]), []).append(row)
    order = list(vlmrm.JUDGED)
    for key in sorted(groups, key=lambda key: (order.index(key[0]), key)):
        some = groups[key]
        best, task = max(some, key=lambda row: row["reward"]), " ".join(key[:2]).strip()
        rates = ("success", "success_held", "success_zero")
        success, held, zero = (spread(row[rate] for row in some) for rate in rates)
        rewards = [
            f"{np.mean([row[name] for row in some]):.3f}"
            for name in ("reward_at_the_end", "reward_of_goal_poses")
        ]
        cells = [task, vlmrm.JUDGED[key[0]][0], len(some)]
        cells += [f"{best['steps']:,.0f}", success, held]
        cells += [f"{best['success']:.0%} / {best['success_held']:.0%}", "; ".join(rewards), zero]
        paper = f"{PAPER[key[0]]:.0%}" if key[0] in PAPER else ""
        print("|", " | ".join(map(str, [*cells, paper])), "|")


def draw_gallery(runs: list[dict], path: Path):
    """The first episode of each task's best run, from CLIP's camera: the eight, then the others."""
    size, best = 160, {}
    for run in sorted(runs, key=lambda run: run["reward"]):
        best[run["task"]] = run
    frames = [Image.new("RGB", (4 * size, -(-len(best) // 4) * size), "white") for _ in range(17)]
    for i, task in enumerate(task for task in vlmrm.JUDGED if task in best):
        with Image.open(best[task]["folder"] / "video.gif") as video:
            for k, frame in enumerate(frames):
                video.seek(2 * k)
                view = video.convert("RGB").crop((34, 44, 206, 216))  # where the robot is
                view = view.resize((size, size), Image.Resampling.BICUBIC)
                text = f"{task}: {best[task]['success']:.0%}"
                ImageDraw.Draw(view).text((4, size - 14), text, "black")
                frame.paste(view, (i % 4 * size, i // 4 * size))
    colours = frames[-1].quantize(96)  # the same for all, so that the file stays small
    frames = [frame.quantize(palette=colours, dither=Image.Dither.NONE) for frame in frames]
    others = frames[1:] + frames[-1:] * 5  # the last one stays for a while
    frames[0].save(path, save_all=True, append_images=others, duration=180, loop=0)


def draw_alphas(rows: list[dict], path: Path):
    """Kneeling by alpha: success, and the steps until an evaluation has 80% of it."""
    caption = "Kneeling by alpha: a point is a seed, the line their mean"
    figure, (left, right) = panels(2, caption, xlabel="alpha")
    alphas = sorted({row["alpha"] for row in rows})
    for row in rows:
        metrics = read_metrics(RUNS / f"{name_of(row)}.csv")
        there = (step["steps"] for step in metrics if step.get("eval_success", 0) >= 0.8)
        row["to80"] = next(there, np.nan)
    for axis, key, label, color in (
        (left, "success", "in half of the steps", "C1"),
        (left, "success_held", "held through the last 20", "C2"),
        (right, "to80", "", "C0"),
    ):
        points = [row["alpha"] for row in rows], [row[key] for row in rows]
        axis.plot(*points, "o", ms=4, alpha=0.5, color=color)
        means = [np.mean([row[key] for row in rows if row["alpha"] == alpha]) for alpha in alphas]
        axis.plot(alphas, means, color=color, label=label)
    left.set(ylabel="success", ylim=(-0.02, 1.02))
    left.legend(fontsize="small")
    for axis in left, right:
        axis.set_xticks(alphas)
    right.set(ylabel="steps to 80% success", ylim=(0, None))
    figure.savefig(path, dpi=100)


def print_parts(run: Path):
    """Of 16 episodes, the CLIP reward, and in what share of their steps the policy does what.

    Both by spans of 20 steps.
    """
    config = json.loads((run / "config.json").read_text())
    clip = vlmrm.CLIP(config["model"])
    reward_fn = vlmrm.VLMReward(clip, config["prompt"], config["baseline"], config["alpha"])
    camera = {key: config.get(key, usual) for key, usual in vlmrm.CAMERA.items()}
    camera["lookat"] = 0, 0, config.get("height", 1)
    envs = vlmrm.make_envs(vlmrm.Scene(clip.size, config["look"], camera))
    (agent, _), states = load_policy(run), []

    def act(obs):
        states.append([env.unwrapped.data.qpos.copy() for env in envs.envs])
        return agent.deterministic_action(obs)

    # the first episodes of the judgement
    reward = sac.rollout(envs, act, 100, reward_fn, seed=2 * 10**9).reward
    print(
        f"{run.name:32} reward          ", *(f"{span.mean():5.2f}" for span in np.split(reward, 5))
    )
    pose = vlmrm.measure_states(vlmrm.Scene().model, np.concatenate(states))  # of 100 x 16 states
    for condition in PARTS:
        spans = np.split(vlmrm.holds(condition, pose), 5)
        if np.any(spans):
            shares = (f"{span.mean():5.0%}" for span in spans)
            print(f"{run.name:32} {condition.__name__:16}", *shares)


def main():
    about = "Tables and pictures of finished runs, into assets/."
    parser = argparse.ArgumentParser(description=about)
    parser.add_argument("runs", nargs="*", type=Path, metavar="RUN")
    parser.add_argument("--policies", action="store_true", help="keep the best ones")
    parser.add_argument("--gallery", action="store_true", help="draw the runs' videos side by side")
    parser.add_argument("--alphas", action="store_true", help="draw kneeling by alpha")
    meaning = "how often each policy holds which legs and arms"
    parser.add_argument("--parts", action="store_true", help=meaning)
    args = parser.parse_args()
    results = []
    for folder in args.runs:
        result = json.loads((folder / "result.json").read_text())
        results.append(result | dict(folder=folder))
    results = [result for result in results if result["task"]]  # others have no success to report
    for result in results:
        result["settings"] = unusual(json.loads((result["folder"] / "config.json").read_text()))
        for name, rates in result["references"].items():
            result[f"success_{name.split()[0]}"] = rates["success"]
    RUNS.mkdir(parents=True, exist_ok=True)
    rows = {}
    for row in [*read(RUNS / "results.csv"), *results]:
        known = {key: row[key] for key in COLUMNS if row.get(key) not in (None, "")}
        # a resumed run does not know its seconds: those of before stay
        rows[name_of(row)] = rows.get(name_of(row), {}) | known
    for result in results:
        shutil.copy(result["folder"] / "metrics.csv", RUNS / f"{name_of(result)}.csv")
    order = ("task", ""), ("settings", ""), ("steps", 0), ("seed", 0)
    rows = sorted(rows.values(), key=lambda row: [row.get(*key) for key in order])
    write_csv(RUNS / "results.csv", COLUMNS, rows)
    print_table(rows)
    if args.policies:
        usual = [result for result in results if not result["settings"]]
        for result in sorted(usual, key=lambda result: result["reward"]):  # the best one last
            config = json.loads((result["folder"] / "config.json").read_text())
            weights = torch.load(result["folder"] / "policy.pt", "cpu", weights_only=True)
            keys = "hidden look distance elevation azimuth height round_steps seed".split()
            settings = {key: config[key] for key in keys if key in config}
            settings |= {key: result[key] for key in ("prompt", "steps", "reward")}
            path = ASSETS / "policies" / f"{result['task']}.safetensors"
            save_small_policy(path, weights, settings)
    if args.gallery:
        draw_gallery(results, ASSETS / "gallery.gif")
    if args.alphas:
        kneeling = [row for row in rows if (row["task"], row["steps"]) == ("kneeling", 60_800)]
        usual = "", *(f"--alpha {row['alpha']:g}" for row in kneeling)
        plain = [row for row in kneeling if row.get("settings", "") in usual]
        draw_alphas(plain, ASSETS / "alpha.png")

    for run in args.runs if args.parts else ():
        print_parts(run)


if __name__ == "__main__":
    main()
