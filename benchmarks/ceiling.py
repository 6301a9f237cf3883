"""How far would SAC come without CLIP? The same training, on a reward written by hand:

    python benchmarks/ceiling.py one-leg

Where a policy fails on CLIP's reward, this says whether physics and SAC stand in the way, or CLIP.
The reward here is how near the body's points (head, shoulders, elbows, hands, hips, knees, feet,
pelvis) are to those of one scripted goal pose, seen from the pelvis: dense, and privileged, for it
reads the simulator and knows the pose. Nothing else uses it. Success is judged as in vlmrm.py.
Prints a row for each task, and adds it to --out.

The numbers in assets/runs/ceiling.csv are of

    python benchmarks/ceiling.py splits --steps 200000 --pink 1
    python benchmarks/ceiling.py arms-raised hands-on-hips arms-crossed --steps 150000
    python benchmarks/ceiling.py arms-crossed --steps 150000 --hands 5

and the splits with --steps 100000, without pink noise, reached 0%. These are of the settings before
version 0.3.0. With those since 0.6.0:

    python benchmarks/ceiling.py splits --steps 200000
    python benchmarks/ceiling.py arms-crossed --steps 100000
"""

import argparse
import csv
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
import vlmrm  # first: it chooses how to draw
import sac
import gymnasium
import numpy as np
from evaluation.states import goal_states
from tqdm import tqdm


class Tracking(vlmrm.Humanoid):
    """Rewarded by exp(-5 d), d the mean distance, in metres, of body points from the goal pose's.

    hands: the weight of a hand in that mean; every other point's is 1.
    """

    def __init__(self, task: str, hands: float = 1):
        super().__init__(vlmrm.Scene(), vlmrm.JUDGED[task][1])
        pose = vlmrm.measure_states(self.model, goal_states(task)[:1])
        self.goal = self.points(vlmrm.Pose(*(value[0] for value in pose)))
        self.weights = np.ones(14)
        self.weights[6:8] = hands  # in the order of points()

    @staticmethod
    def points(pose: vlmrm.Pose) -> np.ndarray:
        """(14, 3), without the two directions that a pose begins with."""
        return np.concatenate([np.atleast_2d(value) for value in pose[2:]])

    def step(self, action):
        observation, _, terminated, truncated, info = super().step(action)
        points = self.points(vlmrm.measure(self.model, self.data))
        distance = np.average(np.linalg.norm(points - self.goal, axis=1), weights=self.weights)
        return observation, float(np.exp(-5 * distance)), terminated, truncated, info


def main():
    about = "What SAC reaches on a dense reward written by hand."
    parser = argparse.ArgumentParser(description=about)
    parser.add_argument("task", nargs="+", choices=vlmrm.JUDGED)
    parser.add_argument("--steps", type=int, default=200_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--pink", type=float, default=0, help="as in sac.py")
    meaning = "weight of a hand in the reward; another point's is 1"
    parser.add_argument("--hands", type=float, default=1, help=meaning)
    parser.add_argument("--out", type=Path, default=Path("runs/ceiling.csv"))
    args = parser.parse_args()
    for task in args.task:

        def make(task=task):
            return gymnasium.wrappers.TimeLimit(Tracking(task, args.hands), 100)

        start, config = time.time(), sac.Config(steps=args.steps, seed=args.seed, pink=args.pink)
        envs = gymnasium.vector.SyncVectorEnv([make] * 16, autoreset_mode="Disabled")
        agent = sac.SAC(envs.single_observation_space, envs.single_action_space, config)
        with tqdm(total=args.steps, unit="step", desc=task) as bar:
            for row in sac.train(agent, sac.Player(envs, None, config)):
                half, _ = vlmrm.success_rates(row["success"])
                bar.set_postfix_str(f"reward {row['reward']:.3f}, success {half:.0%}")
                bar.update(row["steps"] - bar.n)
        played = sac.evaluate(envs, agent.deterministic_action, None, 100, 2 * 10**9, 100)
        half, held = vlmrm.success_rates(played.success.T)
        result = dict(task=task, seed=args.seed, pink=args.pink, hands=args.hands)
        result |= dict(steps=row["steps"])
        result |= dict(
            success=half, success_held=held, reward=round(float(played.reward.mean()), 4)
        )
        result["seconds"] = round(time.time() - start)
        print(result)
        args.out.parent.mkdir(parents=True, exist_ok=True)
        new = not args.out.exists()
        with open(args.out, "a", newline="") as file:
            writer = csv.DictWriter(file, result)
            if new:
                writer.writeheader()
            writer.writerow(result)


if __name__ == "__main__":
    main()
