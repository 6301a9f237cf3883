"""Where would a policy be misled? python evaluation/climb.py, in two minutes on 2 cores with the embedded CLIP

A policy searches for what the reward likes. So does this, but among poses: for each task, the best 96 of 480 random
ones are changed at random, 120 times each, and a change is kept if it earns more (`climb` in tinyclip/make.py, which
looks for a new CLIP's mistakes in the same way). Of where they arrive, it prints

    goal      the share that meets the task's success condition, and its mean reward
    misled    the share that does not, and earns more than the scripted goal poses do on average; its mean reward
    stuck     the rest

and draws the highest of the misled; a CSV file beside the picture keeps the numbers. A policy may be unable to hold
such a pose, and may find others. The combinations that the embedded CLIP was never shown are avoided.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent / "tinyclip"))
import make  # tinyclip/make.py, which finds vlmrm
import vlmrm
import numpy as np
import torch
from PIL import Image, ImageDraw


def arrived(task, args):
    """The last poses of a climb (N, 24), whether each is the goal (N,), their rewards (N,), and those of goal poses."""
    torch.set_num_threads(1)  # two tasks at a time
    (prompt, condition), rng, clip = vlmrm.TASKS[task], np.random.default_rng(args.seed), vlmrm.CLIP(args.model)
    reward_fn, scene = vlmrm.VLMReward(clip, prompt, alpha=args.alpha), vlmrm.Scene(clip.size)
    states = make.climb(prompt, rng, args.model, args.climbers, args.tries, args.alpha)[-1].astype(float)
    goal = vlmrm.holds(condition, vlmrm.measure_states(scene.model, states))
    rewards, of_goals = (reward_fn(vlmrm.render_states(scene, x)) for x in (states, vlmrm.goal_states(task)))
    return states, goal, rewards, of_goals


def main():
    parser = argparse.ArgumentParser(
        description="Where would a policy be misled?", formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--task", nargs="+", choices=vlmrm.TASKS, default=list(vlmrm.TASKS), metavar="TASK")
    parser.add_argument("--model", default=vlmrm.EMBEDDED_CLIP, help="as of vlmrm.py train")
    parser.add_argument("--alpha", type=float, default=0.5, help="strength of the projection")
    parser.add_argument("--climbers", type=int, default=96, help="poses that climb")
    parser.add_argument("--tries", type=int, default=120, help="changes that each of them tries")
    parser.add_argument("--seed", type=int, default=1000, help="of the poses; a training of the CLIP has others")
    parser.add_argument("--out", type=Path, default=Path("runs/climb.png"), help="the picture; beside it, .csv")
    args = parser.parse_args()
    if args.climbers < 1 or args.tries < 3:
        parser.error(f"--climbers {args.climbers}, --tries {args.tries}: at least 1 and 3")
    args.out.parent.mkdir(parents=True, exist_ok=True)
    scene, size, across = vlmrm.Scene((160, 160), effects=True), 118, 8  # of 160 pixels the middle 118
    picture = Image.new("RGB", (across * size, len(args.task) * size), "white")
    table = []
    found = make.in_parallel(arrived, [(task, args) for task in args.task])
    print("task            goal (reward)   misled (reward)   stuck   reward of goal poses")
    for row, (task, (states, goal, rewards, of_goals)) in enumerate(zip(args.task, found)):
        misled = ~goal & (rewards > of_goals.mean())
        numbers = dict(task=task, model=vlmrm.short(args.model), alpha=args.alpha, seed=args.seed)
        for name, kind in dict(goal=goal, misled=misled).items():
            numbers |= {name: kind.mean(), f"{name}_reward": rewards[kind].mean() if kind.any() else np.nan}
        table.append(numbers | {"goal_poses_reward": of_goals.mean()})
        line = "{task:14} {goal:5.0%} ({goal_reward:.3f})   {misled:5.0%} ({misled_reward:.3f})".format(**numbers)
        print(line, f"{(~goal & ~misled).mean():10.0%}   {of_goals.mean():.3f}")
        worst = sorted(np.flatnonzero(misled), key=lambda i: -rewards[i])[:across]
        for column, frame in enumerate(vlmrm.render_states(scene, states[worst]) if worst else ()):
            tile = Image.fromarray(frame[25:143, 21:139])
            ImageDraw.Draw(tile).text((4, 2), f"{task} {rewards[worst[column]]:.2f}", "black")
            picture.paste(tile, (column * size, row * size))
    picture.save(args.out)
    vlmrm.write_csv(args.out.with_suffix(".csv"), table[0], table)
    print(f"See {args.out} and {args.out.with_suffix('.csv')}")


if __name__ == "__main__":
    main()
