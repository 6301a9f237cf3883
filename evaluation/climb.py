"""Where would a policy be misled? In two minutes on 2 cores with the embedded CLIP:

    python evaluation/climb.py

A policy searches for what the reward likes. So does this, but among poses: for each task, the best
96 of 480 random ones are changed at random, 120 times each, and a change is kept if it earns more
(`climb` in tinyclip/poses.py, which looks for a new CLIP's mistakes in the same way). Of where they
arrive, it prints

    goal      the share that meets the task's success condition, and its mean reward
    misled    the share that does not, and earns more than the scripted goal poses do on average;
              its mean reward
    stuck     the rest

and draws the highest of the misled; a CSV file beside the picture keeps the numbers. A policy may
be unable to hold such a pose, and may find others. The combinations that the embedded CLIP was
never shown are avoided.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
import vlmrm  # before mujoco: it chooses how to draw
import numpy as np
import torch
from evaluation.states import goal_states
from PIL import Image, ImageDraw
from support.runs import short, write_csv
from tinyclip.poses import climb, in_parallel


def arrived(task: str, args: argparse.Namespace) -> tuple[np.ndarray, ...]:
    """The last poses of a climb (N, 24), whether each is the goal (N,), their rewards (N,), and
    the rewards of goal poses (M,)."""
    torch.set_num_threads(1)  # two tasks at a time
    (prompt, condition), rng = vlmrm.TASKS[task], np.random.default_rng(args.seed)
    clip = vlmrm.CLIP(args.model)
    reward_fn = vlmrm.VLMReward(clip, prompt, vlmrm.BASELINE_PROMPT, args.alpha)
    scene = vlmrm.Scene(clip.size)
    found = climb(prompt, rng, args.model, args.climbers, args.tries, args.alpha)
    states = found[-1].astype(float)
    goal = vlmrm.holds(condition, vlmrm.measure_states(scene.model, states))
    rewards = reward_fn(vlmrm.render_states(scene, states))
    of_goals = reward_fn(vlmrm.render_states(scene, goal_states(task)))
    return states, goal, rewards, of_goals


def main():
    parser = argparse.ArgumentParser(
        description="Where would a policy be misled?",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    tasks = list(vlmrm.TASKS)
    add = parser.add_argument
    add("--task", nargs="+", choices=vlmrm.TASKS, default=tasks, metavar="TASK")
    add("--model", default=vlmrm.EMBEDDED_CLIP, help="as of vlmrm.py train")
    add("--alpha", type=float, default=0.5, help="strength of the projection")
    add("--climbers", type=int, default=96, help="poses that climb")
    add("--tries", type=int, default=120, help="changes that each of them tries")
    meaning = "of the poses; a training of the CLIP has others"
    add("--seed", type=int, default=1000, help=meaning)
    add("--out", type=Path, default=Path("runs/climb.png"), help="the picture; beside it, .csv")
    args = parser.parse_args()
    if args.climbers < 1 or args.tries < 3:
        parser.error(f"--climbers {args.climbers}, --tries {args.tries}: at least 1 and 3")
    args.out.parent.mkdir(parents=True, exist_ok=True)
    # a row of tiles for each task: of frames of 160 pixels, the middle 118
    scene, size, across = vlmrm.Scene((160, 160), effects=True), 118, 8
    picture = Image.new("RGB", (across * size, len(args.task) * size), "white")
    table = []
    found = in_parallel(arrived, [(task, args) for task in args.task])
    print("task            goal (reward)   misled (reward)   stuck   reward of goal poses")
    for row, (task, (states, goal, rewards, of_goals)) in enumerate(zip(args.task, found)):
        misled = ~goal & (rewards > of_goals.mean())
        numbers = dict(task=task, model=short(args.model), alpha=args.alpha, seed=args.seed)
        for name, kind in dict(goal=goal, misled=misled).items():
            earned = rewards[kind].mean() if kind.any() else np.nan
            numbers |= {name: kind.mean(), f"{name}_reward": earned}
        table.append(numbers | {"goal_poses_reward": of_goals.mean()})
        line = "{task:14} {goal:5.0%} ({goal_reward:.3f})   {misled:5.0%} ({misled_reward:.3f})"
        stuck = ~goal & ~misled
        print(line.format(**numbers), f"{stuck.mean():10.0%}   {of_goals.mean():.3f}")
        worst = sorted(np.flatnonzero(misled), key=lambda i: -rewards[i])[:across]
        frames = vlmrm.render_states(scene, states[worst]) if worst else ()
        for column, frame in enumerate(frames):
            tile = Image.fromarray(frame[25:143, 21:139])
            text = f"{task} {rewards[worst[column]]:.2f}"
            ImageDraw.Draw(tile).text((4, 2), text, "black")
            picture.paste(tile, (column * size, row * size))
    picture.save(args.out)
    write_csv(args.out.with_suffix(".csv"), table[0], table)
    print(f"See {args.out} and {args.out.with_suffix('.csv')}")


if __name__ == "__main__":
    main()
