"""Where would a policy be misled? In some minutes on 2 cores, with the embedded CLIP:

    python evaluation/climb.py

A policy searches for what the reward likes. So does this, but among poses: for each task, the best
96 of 480 random ones are changed at random, 120 times each, and a change is kept if it earns more
(`climb`). Of where they arrive, it prints

    goal      the share that meets the task's success condition
    near      the share that is a near miss: all parts of the condition hold but one
    passed    the share that earns more than the scripted goal poses do on average. A policy could
              stop there
    right     of those, the share that is goal or near; the rest is misled

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
from tinyclip.captions import held_out
from tinyclip.make import choose_arms
from tinyclip.poses import Simulator, changed, in_parallel, random_arms, random_pose


def arrived(task: str, args: argparse.Namespace) -> tuple[np.ndarray, ...]:
    """The last poses of a climb (N, 24), how many parts of the condition each misses (N,), their
    rewards (N,), and the rewards of goal poses (M,)."""
    torch.set_num_threads(1)  # two tasks at a time
    (prompt, condition), rng = vlmrm.TASKS[task], np.random.default_rng(args.seed)
    clip = vlmrm.CLIP(args.model)
    reward_fn = vlmrm.VLMReward(clip, prompt, vlmrm.BASELINE_PROMPT, args.alpha)
    scene = vlmrm.Scene(clip.size)
    found = climb(prompt, rng, args.model, args.climbers, args.tries, args.alpha)
    states = found[-1].astype(float)
    parts = condition(vlmrm.measure_states(scene.model, states)).values()
    missed = (~np.stack(list(parts))).sum(0)
    rewards = reward_fn(vlmrm.render_states(scene, states))
    of_goals = reward_fn(vlmrm.render_states(scene, goal_states(task)))
    return states, missed, rewards, of_goals


def climb(
    prompt: str,
    rng: np.random.Generator,
    model: str,
    climbers: int = 96,
    tries: int = 120,
    alpha: float = 0.5,
) -> np.ndarray:
    """What a CLIP likes, found without a policy: every change of a pose stays that earns more.

    The best fifth of random poses climb; model and alpha are those of vlmrm's CLIP and VLMReward.
    Returns the poses after a third, two thirds and all of the tries (at least 3), float32
    (3, climbers, 24). Poses that are held out earn -1.
    """
    sim, kept, clip = Simulator(vlmrm.Scene().model), [], vlmrm.CLIP(model)
    arms = choose_arms(sim.model, random_arms(sim, rng, 40_000), 200, rng)
    reward_fn = vlmrm.VLMReward(clip, prompt, vlmrm.BASELINE_PROMPT, alpha)
    scene = vlmrm.Scene(clip.size)

    def reward(states):
        forbidden = held_out(vlmrm.measure_states(sim.model, states))
        return np.where(forbidden, -1, reward_fn(vlmrm.render_states(scene, states)))

    states = np.array([random_pose(sim, arms, rng) for _ in range(5 * climbers)])
    rewards = reward(states)
    best = np.argsort(rewards)[-climbers:]
    states, rewards = states[best], rewards[best]
    for i in range(1, tries + 1):
        others = np.array([changed(sim, arms, qpos, rng) for qpos in states])
        earned = reward(others)
        better = earned > rewards
        states[better], rewards[better] = others[better], earned[better]
        if i in (tries // 3, 2 * tries // 3, tries):
            kept.append(states.astype(np.float32))
    return np.array(kept)


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
    print("task            goal  near  passed  right  reward: highest, mean, of goal poses")
    for row, (task, (states, missed, rewards, of_goals)) in enumerate(zip(args.task, found)):
        passed = rewards > of_goals.mean()
        misled = passed & (missed > 1)
        right = (missed[passed] <= 1).mean() if passed.any() else np.nan
        numbers = dict(task=task, model=short(args.model), alpha=args.alpha, seed=args.seed)
        numbers |= dict(goal=(missed == 0).mean(), near=(missed == 1).mean())
        numbers |= dict(passed=passed.mean(), right=right, highest=rewards.max())
        numbers |= dict(mean=rewards.mean(), goal_poses=of_goals.mean())
        table.append(numbers)
        line = "{task:14} {goal:5.0%} {near:5.0%} {passed:7.0%} {right:6.0%}"
        line += "  {highest:.3f} {mean:.3f} {goal_poses:.3f}"
        print(line.format(**numbers), flush=True)
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
