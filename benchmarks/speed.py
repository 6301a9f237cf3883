"""Times this project beside what one would otherwise write, in one run and on the same work:

    python benchmarks/speed.py                             # all rows, on the CPU
    python benchmarks/speed.py sac render                  # some of them
    # encoders, with random weights
    python benchmarks/speed.py vit --device cuda --models ViT-B-32 ViT-bigG-14

Where SBX is installed (pip install sbx-rl), which is stable-baselines3 in JAX, it is timed too.

Each row times two things in turn, A B A B ..., and gives the median of the ratios of neighbours, so
that a machine that speeds up or slows down meanwhile does not decide. Run nothing beside it.
"""

import argparse
import functools
import importlib.util
import platform
import statistics
import sys
import time
import warnings
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
import vlmrm  # first: it chooses how to draw
import sac
import gymnasium
import mujoco
import numpy as np
import open_clip
import torch
import torch.nn as nn
import torch.nn.functional as F
import torchvision.transforms.v2.functional as TF
from evaluation.states import load_states
from support.workers import Workers, default_workers
from torch.utils.flop_counter import FlopCounterMode

OBS, ACT = 348, 17  # of the humanoid
ENVS = 16  # environments of the whole loop
TURN = sac.Config.eval_every  # its steps in a turn: with one evaluation
PROMPTS = vlmrm.TASKS["kneeling"][0], vlmrm.BASELINE_PROMPT


def compare(name, ours, other, unit, pairs, device="cpu"):
    """ours, other: (function, units of work that a call does). Prints and returns the rates."""
    rates = [], []
    for i in range(pairs + 1):
        for (function, amount), kept in zip((ours, other), rates):
            start = time.perf_counter()
            function()
            if device != "cpu":
                torch.cuda.synchronize(device)
            if i:  # the first pair warms up
                kept.append(amount / (time.perf_counter() - start))
    ratios = [a / b for a, b in zip(*rates)]
    one, two = (statistics.median(r) for r in rates)
    print(
        f"{name:66} {one:9.4g} {two:9.4g} {unit:10} {statistics.median(ratios):7.2f}x  "
        f"({min(ratios):.2f} to {max(ratios):.2f})",
        flush=True,
    )
    return one, two


# --------------------------------------------------------------------------------------------------
# SAC updates


class CleanRL:
    """One SAC update as CleanRL's sac_continuous_action.py does it, eagerly; only to be timed."""

    def __init__(self, device, hidden=256):
        def mlp(inputs, outputs):
            return nn.Sequential(
                nn.Linear(inputs, hidden),
                nn.ReLU(),
                nn.Linear(hidden, hidden),
                nn.ReLU(),
                nn.Linear(hidden, outputs),
            ).to(device)

        self.critics, self.targets = ([mlp(OBS + ACT, 1) for _ in range(2)] for _ in range(2))
        self.actor = mlp(OBS, 2 * ACT)
        self.log_alpha = torch.zeros(1, requires_grad=True, device=device)
        self.optimizers = [
            torch.optim.Adam(parameters, 1e-3)
            for parameters in (
                [p for critic in self.critics for p in critic.parameters()],
                self.actor.parameters(),
                [self.log_alpha],
            )
        ]
        self.count = 0

    def act(self, obs):
        mean, log_std = self.actor(obs).chunk(2, -1)
        normal = torch.distributions.Normal(mean, (-5 + 3.5 * (log_std.tanh() + 1)).exp())
        u = normal.rsample()
        log_prob = (normal.log_prob(u) - (1 - u.tanh() ** 2 + 1e-6).log()).sum(1, keepdim=True)
        return u.tanh(), log_prob

    @staticmethod
    def step(optimizer, loss):
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    def update(self, obs, action, reward, next_obs, terminated):
        with torch.no_grad():
            next_action, next_log_prob = self.act(next_obs)
            next_pair = torch.cat([next_obs, next_action], 1)
            q = torch.min(*(target(next_pair) for target in self.targets))
            y = reward + (1 - terminated) * 0.99 * (q - self.log_alpha.exp() * next_log_prob)
        pair = torch.cat([obs, action], 1)
        self.step(self.optimizers[0], sum(F.mse_loss(q(pair), y) for q in self.critics))
        self.count += 1
        for _ in range(2 * (self.count % 2)):  # the policy every second time, twice
            new_action, log_prob = self.act(obs)
            q = torch.min(*(critic(torch.cat([obs, new_action], 1)) for critic in self.critics))
            self.step(self.optimizers[1], (self.log_alpha.exp().detach() * log_prob - q).mean())
            entropy_gap = log_prob.detach() - ACT
            self.step(self.optimizers[2], -(self.log_alpha.exp() * entropy_gap).mean())
        for slow, fast in zip(self.targets, self.critics):
            for old, new in zip(slow.parameters(), fast.parameters()):
                old.data.copy_(0.005 * new.data + 0.995 * old.data)


class Spaces(gymnasium.Env):
    """The humanoid's spaces without the humanoid."""

    observation_space = gymnasium.spaces.Box(-np.inf, np.inf, (OBS,), np.float32)
    action_space = gymnasium.spaces.Box(-0.4, 0.4, (ACT,), np.float32)

    def reset(self, seed=None, options=None):
        return self.observation_space.sample(), {}

    def step(self, action):
        return self.observation_space.sample(), 0.0, False, False, {}


def matmul_shapes(batch, hidden=256):
    """Of all matrix products in one update: (m, k), (k, n) -> (m, n)."""

    def forward(inputs, outputs):
        return [(batch, inputs, hidden), (batch, hidden, hidden), (batch, hidden, outputs)]

    def to_weights(shapes):
        return [(k, m, n) for m, k, n in shapes]

    def to_inputs(shapes):
        return [(m, n, k) for m, k, n in shapes]

    q, pi = forward(OBS + ACT, 1), forward(OBS, 2 * ACT)
    # of both critics the targets, the values and their gradients; the next action
    critic_step = 2 * (q + q + to_weights(q) + to_inputs(q[1:])) + pi
    actor_step = 2 * (q + to_inputs(q)) + pi + to_weights(pi) + to_inputs(pi[1:])
    return critic_step + actor_step


def bench_sac(args):
    import stable_baselines3

    warnings.filterwarnings("ignore", module="stable_baselines3")
    for batch in (256, 512):
        config = sac.Config(batch_size=batch)
        agent = sac.SAC(Spaces.observation_space, Spaces.action_space, config, args.device)
        buffer = sac.ReplayBuffer(20_000, OBS, ACT)
        width = 2 * OBS + ACT + 2
        rows = torch.randn(20_000, width)
        buffer.add(rows * (torch.arange(width) < width - 1))  # the last column: none terminated
        agent.norm.update(buffer.data[:, :OBS].to(args.device))
        sb3 = stable_baselines3.SAC(
            "MlpPolicy",
            Spaces(),
            batch_size=batch,
            buffer_size=20_000,
            device=args.device,
            policy_kwargs=dict(net_arch=[256, 256]),
        )
        others = {"stable-baselines3": sb3}
        if args.device == "cpu" and importlib.util.find_spec("sbx"):
            import sbx

            sizes = dict(batch_size=batch, buffer_size=20_000)
            others["SBX"] = sbx.SAC("MlpPolicy", Spaces(), **sizes)  # 256-256, too
        for other in others.values():
            other.set_logger(stable_baselines3.common.logger.Logger(None, []))
            for _ in range(20_000):
                obs = np.random.randn(2, 1, OBS).astype(np.float32)
                action = np.random.rand(1, ACT)
                other.replay_buffer.add(*obs, action, np.zeros(1), np.zeros(1), [{}])
        cleanrl, count = CleanRL(args.device), 100

        def ours():
            for _ in range(count):
                agent.update(*buffer.sample(batch, args.device))

        def theirs():
            for _ in range(count):
                obs, action, reward, next_obs, terminated = buffer.sample(batch, args.device)
                cleanrl.update(obs, action, reward[:, None], next_obs, terminated[:, None])

        for precision in ("highest", "medium"):

            def precise():
                torch.set_float32_matmul_precision(precision)
                ours()
                torch.set_float32_matmul_precision("highest")

            how = {"highest": "fp32", "medium": "bf16 matmuls (theirs fp32)"}[precision]
            for name, other in others.items():
                compare(
                    f"SAC, batch {batch}, {how}: ours, {name}",
                    (precise, count),
                    (functools.partial(other.train, count, batch), count),
                    "updates/s",
                    args.pairs,
                    args.device,
                )
            compare(
                f"SAC, batch {batch}, {how}: ours, CleanRL's update",
                (precise, count),
                (theirs, count),
                "updates/s",
                args.pairs,
                args.device,
            )
            if args.device == "cpu":

                def products():
                    torch.set_float32_matmul_precision(precision)
                    for a, b in pairs * count:
                        a @ b
                    torch.set_float32_matmul_precision("highest")

                pairs = [(torch.randn(m, k), torch.randn(k, n)) for m, k, n in matmul_shapes(batch)]
                compare(
                    f"SAC, batch {batch}, {how}: ours, its products alone",
                    (precise, count),
                    (products, count),
                    "updates/s",
                    args.pairs,
                )

        compiled = sac.SAC(Spaces.observation_space, Spaces.action_space, config, args.device)
        compiled.norm.load_state_dict(agent.norm.state_dict())
        for loss in ("critic_loss", "actor_loss"):  # reduce-overhead: as CUDA graphs, on a GPU
            setattr(compiled, loss, torch.compile(getattr(compiled, loss), mode="reduce-overhead"))

        def ours_compiled():
            for _ in range(count):
                compiled.update(*buffer.sample(batch, args.device))

        compare(
            f"SAC, batch {batch}, fp32: ours by torch.compile, ours",
            (ours_compiled, count),
            (ours, count),
            "updates/s",
            args.pairs,
            args.device,
        )


# --------------------------------------------------------------------------------------------------
# Frames


def poses(count):
    """Different states, qpos (count, 24)."""
    states, _ = load_states()
    return states[np.linspace(0, len(states) - 1, count).astype(int)]


class Usual:
    """Pipeline (c): gymnasium's render at 480 x 480, torchvision's bicubic resize, CLIP in fp32."""

    def __init__(self, clip):
        settings = dict(render_mode="rgb_array", width=480, height=480)
        self.env, self.clip = gymnasium.make("Humanoid-v5", **settings), clip
        self.env.reset(seed=0)
        self.reward = vlmrm.VLMReward(clip, *PROMPTS)

    def render(self, qpos=None):
        if qpos is not None:
            self.env.unwrapped.set_state(qpos, np.zeros(23))
        renderer = self.env.unwrapped.mujoco_renderer
        # ours may be current: Gymnasium expects to be alone
        renderer._get_viewer("rgb_array").make_context_current()
        return self.env.render()

    @torch.no_grad()
    def label(self, frames):
        x = torch.from_numpy(frames.copy()).permute(0, 3, 1, 2).to(self.clip.device).float() / 255
        bicubic = TF.InterpolationMode.BICUBIC
        x = TF.resize(x, list(self.clip.size), bicubic, antialias=True).clamp(0, 1)
        state = self.clip.model.encode_image((x - self.clip.mean) / self.clip.std)
        goal, baseline = self.reward.goal, self.reward.baseline
        return vlmrm.goal_baseline_reward(state, goal, baseline, 0.5).cpu().numpy()


def bench_render(args):
    states, usual = poses(200), Usual(vlmrm.CLIP(device=args.device))
    for size in (64, 96, 224):
        scene = vlmrm.Scene((size, size))
        compare(
            f"frames at {size} px: ours, gymnasium's at 480 px",
            (lambda: vlmrm.render_states(scene, states), len(states)),
            (lambda: [usual.render(qpos) for qpos in states[::20]], 10),
            "frames/s",
            args.pairs,
        )


def print_agreement(name, bf16, fp32, frames):
    rewards = [vlmrm.VLMReward(clip, *PROMPTS)(frames) for clip in (bf16, fp32)]
    ranks, apart = [r.argsort().argsort() for r in rewards], np.abs(rewards[0] - rewards[1]).max()
    correlation = np.corrcoef(*ranks)[0, 1]
    print(
        f"{name}: {len(frames)} rewards in bf16 and fp32 differ by at most {apart:.1e}; "
        f"they spread over {np.ptp(rewards[1]):.1e}; rank correlation {correlation:.5f}"
    )


def bench_label(args):
    clip, states = vlmrm.CLIP(device=args.device), poses(512)
    scene, usual, reward = vlmrm.Scene(clip.size), Usual(clip), vlmrm.VLMReward(clip, *PROMPTS)

    def ours():
        reward(vlmrm.render_states(scene, states))

    def one_at_a_time():
        for qpos in states[::32]:
            usual.label(usual.render(qpos)[None])

    def in_batches():
        usual.label(np.stack([usual.render(qpos) for qpos in states[::32]]))

    for how, theirs in (("one at a time", one_at_a_time), ("in batches", in_batches)):
        compare(
            f"labelled frames, embedded CLIP: ours, pipeline (c) {how}",
            (ours, len(states)),
            (theirs, 16),
            "frames/s",
            args.pairs,
            args.device,
        )
    bf16 = vlmrm.CLIP(device=args.device, precision="bf16")
    print_agreement("embedded CLIP", bf16, clip, vlmrm.render_states(scene, poses(3340)))


def random_clip(name, device, precision):
    """vlmrm.CLIP around random weights: speed does not depend on them."""
    original = open_clip.create_model

    def create(*_, **settings):
        settings.pop("require_pretrained")
        with torch.device(device):
            return original(name, **settings)

    open_clip.create_model = create
    try:
        torch.manual_seed(0)
        tag = open_clip.list_pretrained_tags_by_model(name)[0]
        return vlmrm.CLIP(f"{name}/{tag}", device, precision)
    finally:
        open_clip.create_model = original


def operations(model, x):
    """Floating-point operations of the image tower for x, an addition and a multiplication each."""
    # on the fast path, the counter misses the products of the attention layers
    torch.backends.mha.set_fastpath_enabled(False)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model.encode_image(x)
    torch.backends.mha.set_fastpath_enabled(True)
    return counter.get_total_flops()


def bench_vit(args):
    for name in args.models:
        clip, fp32 = (random_clip(name, args.device, precision) for precision in ("bf16", "fp32"))
        states = poses(args.frames)
        frames = vlmrm.render_states(vlmrm.Scene(clip.size), states)
        ready, ready32 = clip.preprocess(frames), fp32.preprocess(frames)

        @torch.inference_mode()
        def encoder(model, x):
            for part in x.split(128):
                model.encode_image(part)

        _, rate = compare(
            f"{name} in bf16: rewards of frames, its encoder alone",
            (lambda: clip.embed_images(frames), len(frames)),
            (lambda: encoder(clip.model, ready), len(frames)),
            "frames/s",
            args.pairs,
            args.device,
        )
        work = operations(clip.model, ready[:1])
        speed = f"its encoder alone does {work * rate / 1e12:.3g} TFLOP/s"
        print(f"{name}: {work / 1e9:.1f} GFLOP a frame, so {speed}")
        reward, scene = vlmrm.VLMReward(clip, *PROMPTS), vlmrm.Scene(clip.size)
        compare(
            f"{name} in bf16: rendering and rewards, its encoder alone",
            (lambda: reward(vlmrm.render_states(scene, states)), len(states)),
            (lambda: encoder(clip.model, ready), len(states)),
            "frames/s",
            args.pairs,
            args.device,
        )
        compare(
            f"{name}: encoder in bf16, in fp32",
            (lambda: encoder(clip.model, ready), len(frames)),
            (lambda: encoder(fp32.model, ready32), len(frames)),
            "frames/s",
            args.pairs,
            args.device,
        )
        if args.device == "cpu":
            usual, some = Usual(fp32), states[::16]
            compare(
                f"labelled frames, {name}: ours in bf16, pipeline (c) one at a time",
                (lambda: reward(vlmrm.render_states(scene, states)), len(states)),
                (lambda: [usual.label(usual.render(qpos)[None]) for qpos in some], len(some)),
                "frames/s",
                args.pairs,
            )
        print_agreement(f"{name}, random weights", clip, fp32, frames)


# --------------------------------------------------------------------------------------------------
# The whole loop


class Labelled(gymnasium.Wrapper):
    """Pipeline (c) as an environment: every step is rendered and rewarded at once."""

    def __init__(self, usual):
        super().__init__(gymnasium.wrappers.TimeLimit(usual.env.unwrapped, 100))
        self.usual = usual

    def step(self, action):
        obs, _, _, truncated, info = self.env.step(action)
        return obs, float(self.usual.label(self.usual.render()[None])[0]), False, truncated, info


def bench_loop(args):
    import stable_baselines3

    clip = vlmrm.CLIP(device=args.device)
    config = sac.Config(steps=150_000)
    reward = vlmrm.VLMReward(clip, *PROMPTS)
    scene, condition = vlmrm.Scene(clip.size), vlmrm.TASKS["kneeling"][1]
    make = functools.partial(vlmrm.make_envs, scene, condition, episode_steps=100)
    sb3 = stable_baselines3.SAC(
        "MlpPolicy",
        Labelled(Usual(clip)),
        batch_size=config.batch_size,
        gamma=0.95,
        learning_rate=6e-4,
        train_freq=4,
        gradient_steps=1,
        learning_starts=100,
        device=args.device,
        policy_kwargs=dict(net_arch=[256, 256]),
    )
    threads, others = torch.get_num_threads(), default_workers(ENVS, config.eval_episodes)
    turn = TURN // (ENVS * config.round_steps)  # rounds
    for workers in dict.fromkeys((others, 0)):
        player = sac.Player(make(count=ENVS), reward, config)
        if workers:
            player = Workers(make, ENVS, reward, config, workers, args.device != "cpu")
        agent = vlmrm.prepare(reward, config, count=1)[0]
        rounds = sac.train(agent, player)  # with its evaluations

        def ours(rounds=rounds, player=player, workers=workers):
            torch.set_num_threads(max(1, threads - workers))
            for _ in range(turn):
                next(rounds)
            if workers:  # what they play ahead is timed too, and done before the other's turn
                for _, pipe, _ in player.workers:
                    pipe.poll(None)
            torch.set_num_threads(threads)

        for _ in range(2):
            ours()
        compare(
            f"whole loop, {workers} workers: ours, stable-baselines3 on pipeline (c)",
            (ours, turn * ENVS * config.round_steps),
            (lambda: sb3.learn(100, reset_num_timesteps=False), 100),
            "steps/s",
            args.pairs,
            args.device,
        )
        if workers:
            player.close()


BENCHMARKS = dict(sac=bench_sac, render=bench_render, label=bench_label)
BENCHMARKS |= dict(vit=bench_vit, loop=bench_loop)


def main():
    about = "Times this project beside the usual ways. Run nothing beside it."
    parser = argparse.ArgumentParser(description=about)
    parser.add_argument("what", nargs="*", choices=[*BENCHMARKS, []], help="which; left out: all")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--pairs", type=int, default=5)
    meaning = "open_clip architectures, for vit"
    parser.add_argument("--models", nargs="+", default=["ViT-B-32"], help=meaning)
    parser.add_argument("--frames", type=int, default=64, help="in a call, for vit")
    args = parser.parse_args()
    cpu = platform.processor()
    if platform.system() == "Linux":
        names = (line.split(":")[1] for line in open("/proc/cpuinfo") if "model name" in line)
        cpu = next(names, "").strip()
    import stable_baselines3

    modules = torch, open_clip, gymnasium, mujoco, stable_baselines3
    versions = ", ".join(f"{module.__name__} {module.__version__}" for module in modules)
    where = f"{cpu}, {torch.get_num_threads()} threads, {args.device}"
    print(f"{where}; {versions}; medians of {args.pairs} pairs")
    print(f"{'':66} {'ours':>9} {'other':>9} {'':10} {'ratio':>8}")
    for name in args.what or BENCHMARKS:
        BENCHMARKS[name](args)


if __name__ == "__main__":
    main()
