"""Soft Actor-Critic, and Algorithm 1 of the VLM-RM paper: learning from a function of frames.

The words of reinforcement learning: at each step a policy sees an observation s of its environment
and takes an action a. It gets a reward r and the next observation s'. That is a transition, and a
run of such steps an episode. Wanted is a policy whose sum of rewards is high on average, where
each reward counts gamma times as much as the one a step earlier: the discounted sum.

Algorithm 1 is made for rewards that are slow one at a time and fast in batches, like those of a
vision model. In a round, the policy acts in many environments for the length of an episode, and
keeps the frames. One call of `reward_fn(frames) -> rewards` labels them all: it gives each frame
its reward. The labelled transitions go to a replay buffer, a store from which SAC draws random
batches to update its networks. While it does, the next round may already be played, by the policy
as it was before. Nothing here knows CLIP, and the networks never see a frame.

SAC (Haarnoja et al. 2018, "Soft Actor-Critic Algorithms and Applications", arXiv:1812.05905) has

    an actor       the policy pi(a|s): for each observation a distribution of actions, whose middle
                   and spread it learns
    two critics    Q(s, a), the discounted sum that is to be expected after a in s, with a bonus at
                   each later step for the policy's randomness there, its entropy. V(s) is the same
                   before a is chosen, with the bonus for s too: the mean over the policy's actions
                   of Q(s, a) - temperature * log pi(a|s). On average over s',
                   Q(s, a) = r + gamma V(s'). This is the soft Bellman equation, and the critics
                   learn to fulfil it. A critic errs, and the actor would pick just what it
                   overrates; so the lower estimate of two critics counts. And V(s') comes from
                   copies that follow the critics slowly: from the critics themselves, each update
                   would at once move the target that it learns from
    a temperature  the weight of that bonus. It rises while the policy is less random than is
                   wanted, and falls while it is more

    python sac.py    # runs by itself: learns to swing a pendulum up, from the usual reward
"""

import copy
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, fields
from typing import NamedTuple

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from gymnasium.spaces import Box
from gymnasium.vector import AutoresetMode, VectorEnv
from torch import Tensor


def setting(default: float, meaning: str, least: float = 1e-9, most: float = 1e12):
    return field(default=default, metadata=dict(help=meaning, least=least, most=most))


@dataclass
class Config:
    """Hyperparameters, chosen for minutes on two CPU cores. [The paper's, where they differ.]

    What else differs from the VLM-RM paper's SAC: standardised observations, layer norm in the
    critics, the averaged actor, checkpoints chosen by the reward of evaluations, not of training,
    and rounds that are played while the round before is still being learned from. And when an
    episode's time is up, it counts as if it went on; in the authors' code nothing follows.
    """

    steps: int = setting(60_000, "environment steps, rounded up to whole rounds [10 million]")
    learning_starts: int = setting(4_800, "first steps, without updates [50,000, random actions]")
    round_steps: int = setting(100, "steps of an episode, and of each environment in a round")
    updates_per_step: float = setting(0.25, "gradient updates for each environment step [1/32]")
    batch_size: int = setting(128, "transitions in an update [512]")
    buffer_size: int = setting(1_000_000, "transitions that the replay buffer remembers")
    pink: float = setting(0.0, "share of the run, from its start, with pink_noise", 0, 1)
    gamma: float = setting(0.95, "discount of the next step's value", most=1)
    tau: float = setting(0.005, "share of the critics that their slow copies take over", most=1)
    actor_tau: float = setting(0.001, "the same of the actor's averaged copy [1: no copy]", most=1)
    learning_rate: float = setting(6e-4, "of Adam at the start; falls towards 0 [constant]")
    init_temperature: float = setting(0.05, "weight of entropy at the start; it is learned [1]")
    hidden: int = setting(256, "width of the two hidden layers of each network")
    eval_every: int = setting(4_800, "steps between evaluations; never less than steps / 32")
    eval_episodes: int = setting(16, "episodes in an evaluation")
    seed: int = setting(0, "of everything random", 0, 10**8)

    def __post_init__(self):
        for option in fields(self):
            name, value = option.name, getattr(self, option.name)
            least, most = option.metadata["least"], option.metadata["most"]
            if not least <= value <= most or option.type(value) != value:
                kind = "whole number" if option.type is int else "number"
                raise ValueError(f"{name} is {value}; it has to be a {kind}, {least} to {most:g}")
            setattr(self, name, option.type(value))  # 1e6 is a whole number too
        if self.learning_starts > self.steps:
            given = f"learning_starts is {self.learning_starts}, of {self.steps} steps in all"
            raise ValueError(f"{given}: nothing would be learned")


# --------------------------------------------------------------------------------------------------
# Networks. B: batch, O: size of an observation, A: size of an action.


class RunningNorm(nn.Module):
    """Standardises observations by the mean and variance of all so far, and clips them to +-10."""

    def __init__(self, size: int):
        super().__init__()
        self.register_buffer("mean", torch.zeros(size))
        self.register_buffer("var", torch.ones(size))
        self.register_buffer("count", torch.zeros(()))

    def update(self, x: Tensor):  # (B, O): merges the moments of two samples, Chan et al. 1979
        count = self.count + len(x)
        delta = x.mean(0) - self.mean
        within = (x.var(0, correction=0) - self.var) * len(x) / count
        self.var += within + delta**2 * self.count * len(x) / count**2
        self.mean += delta * len(x) / count
        self.count += len(x)

    def forward(self, x: Tensor) -> Tensor:
        return ((x - self.mean) / (self.var + 1e-8).sqrt()).clamp(-10, 10)


class Actor(nn.Module):
    """The policy pi(a|s): a Gaussian u ~ N(mean, std), squashed to a = tanh(u) in (-1, 1)."""

    def __init__(self, obs_size: int, act_size: int, hidden: int):
        super().__init__()
        layers = nn.Linear(obs_size, hidden), nn.ReLU(), nn.Linear(hidden, hidden), nn.ReLU()
        self.body = nn.Sequential(*layers)
        self.head = nn.Linear(hidden, 2 * act_size)

    def forward(self, obs: Tensor, noise: Tensor | float | None = None) -> tuple[Tensor, Tensor]:
        """obs (B, O) -> action (B, A) and log_prob (B,), which is log pi(action|obs).

        noise (B, A): left out, drawn from N(0, 1); 0 gives the middle of the policy.
        """
        mean, log_std = self.head(self.body(obs)).chunk(2, -1)  # (B, A) each
        log_std = log_std.clamp(-20, 2)
        noise = torch.randn_like(mean) if noise is None else noise
        u = mean + log_std.exp() * noise
        log_prob = (-0.5 * noise**2 - log_std - 0.5 * math.log(2 * math.pi)).sum(-1)  # of u
        # Of a = tanh(u), log_prob is less by log|da/du| = log(1 - tanh(u)^2) (App. C of SAC's
        # paper). This form of the same does not round to log(0) where |u| is large:
        log_prob = log_prob - 2 * (math.log(2) - u - F.softplus(-2 * u)).sum(-1)
        return u.tanh(), log_prob


class TwinCritic(nn.Module):
    """Q1(s, a) and Q2(s, a), two separate networks. Layer norm keeps them from diverging."""

    def __init__(self, obs_size: int, act_size: int, hidden: int):
        super().__init__()

        def layer(inputs):
            norm = nn.LayerNorm(hidden, elementwise_affine=False)  # no learned scale
            return nn.Linear(inputs, hidden), norm, nn.ReLU()

        def network():
            return nn.Sequential(*layer(obs_size + act_size), *layer(hidden), nn.Linear(hidden, 1))

        self.q1, self.q2 = network(), network()

    def forward(self, obs: Tensor, action: Tensor) -> Tensor:
        """obs (B, O), action (B, A) -> (2, B)."""
        x = torch.cat([obs, action], -1)
        return torch.stack([self.q1(x), self.q2(x)]).squeeze(-1)


class ReplayBuffer:
    """Labelled transitions (s, a, r, s', terminated). The oldest are overwritten first."""

    def __init__(self, size: int, obs_size: int, act_size: int):
        self.size, self.next, self.full = size, 0, False
        self.widths = [obs_size, act_size, 1, obs_size, 1]
        self.data = torch.zeros(size, sum(self.widths))  # in the CPU's memory

    def __len__(self):
        return self.size if self.full else self.next

    def add(self, rows: Tensor):  # (n, sum of widths)
        if len(rows) > self.size:
            raise ValueError(f"buffer_size is too small: a round has {len(rows)} transitions")
        self.data[(self.next + torch.arange(len(rows))) % self.size] = rows
        self.full |= self.next + len(rows) >= self.size
        self.next = (self.next + len(rows)) % self.size

    def sample(self, batch_size: int, device: str = "cpu") -> tuple[Tensor, ...]:
        """A random batch: obs (B, O), action (B, A), reward (B,), next_obs, terminated (B,)."""
        rows = self.data[torch.randint(len(self), (batch_size,))].to(device)
        obs, action, reward, next_obs, terminated = rows.split(self.widths, 1)
        return obs, action, reward.squeeze(1), next_obs, terminated.squeeze(1)


# --------------------------------------------------------------------------------------------------
# SAC


class SAC(nn.Module):
    """Actor, critics, temperature, and an update of them all.

    Raises ValueError unless observations and actions are Boxes of one dimension, and actions have
    finite bounds.
    """

    def __init__(
        self, observation_space: Box, action_space: Box, config: Config, device: str = "cpu"
    ):
        super().__init__()
        for space in observation_space, action_space:
            if not isinstance(space, Box) or len(space.shape) != 1:
                raise ValueError(f"a space is {space}; it has to be a Box of one dimension")
        if not np.isfinite(action_space.high - action_space.low).all():
            raise ValueError(f"actions are {action_space}; they need finite bounds")
        torch.manual_seed(config.seed)
        obs_size, act_size = observation_space.shape[0], action_space.shape[0]
        self.obs_size, self.act_size, self.config, self.device = obs_size, act_size, config, device
        self.norm = RunningNorm(obs_size)  # of observations
        self.actor = Actor(obs_size, act_size, config.hidden)
        self.mean_actor = copy.deepcopy(self.actor).requires_grad_(False)  # of averaged weights
        self.critic = TwinCritic(obs_size, act_size, config.hidden)
        self.target = copy.deepcopy(self.critic).requires_grad_(False)  # the critics' slow copies
        self.log_temperature = nn.Parameter(torch.tensor(math.log(config.init_temperature)))
        self.target_entropy = -float(act_size)  # usual; a density's entropy may be negative
        self.to(device)
        trained = self.critic.parameters(), [*self.actor.parameters(), self.log_temperature]
        self.optimizers = [torch.optim.Adam(x, config.learning_rate, fused=True) for x in trained]

    @torch.no_grad()
    def act(self, obs: np.ndarray, noise: Tensor | None = None) -> np.ndarray:
        """Raw observations (N, O) -> actions (N, A) in (-1, 1), drawn from the policy."""
        obs = torch.as_tensor(obs, dtype=torch.float32, device=self.device)
        return self.actor(self.norm(obs), noise)[0].cpu().numpy()

    @torch.no_grad()
    def deterministic_action(self, obs: np.ndarray) -> np.ndarray:
        """Raw observations (N, O) -> actions (N, A) in (-1, 1): the middle of the policy.

        This is what is judged. The actor's weights are averaged over its last updates, which makes
        a steadier policy than any one of them.
        """
        obs = torch.as_tensor(obs, dtype=torch.float32, device=self.device)
        return self.mean_actor(self.norm(obs), noise=0)[0].cpu().numpy()

    # The losses take a batch: obs and next_obs (B, O), standardised; action (B, A); reward,
    # terminated and log_prob (B,).

    def critic_loss(self, obs, action, reward, next_obs, terminated) -> Tensor:
        """The soft Bellman equation: (Q(s, a) - y)^2, where y = r + gamma V(s'), or r at an end."""
        with torch.no_grad():
            next_action, next_log_prob = self.actor(next_obs)
            next_q = self.target(next_obs, next_action).min(0).values  # (B,) the lower of two
            next_value = next_q - self.log_temperature.exp() * next_log_prob  # V(s') with its bonus
            # Only an end cuts the future off. An episode whose time is up would have gone on.
            y = reward + self.config.gamma * (1 - terminated) * next_value  # (B,)
        return (self.critic(obs, action) - y).square().mean(1).sum()  # mean over B, sum of both

    def actor_loss(self, obs) -> tuple[Tensor, Tensor]:
        """temperature * log pi(a|s) - Q(s, a), for actions of the policy, and their log_prob."""
        action, log_prob = self.actor(obs)
        q = self.critic(obs, action).min(0).values
        return (self.log_temperature.exp().detach() * log_prob - q).mean(), log_prob.detach()

    def temperature_loss(self, log_prob) -> Tensor:
        """Raises the temperature while the policy's entropy is below its target, else lowers it."""
        return -(self.log_temperature.exp() * (log_prob + self.target_entropy)).mean()

    def update(self, obs, action, reward, next_obs, terminated) -> dict[str, Tensor]:
        """A gradient step of everything, on a batch from ReplayBuffer.sample: raw observations."""
        critic_optimizer, actor_optimizer = self.optimizers
        obs, next_obs = self.norm(obs), self.norm(next_obs)
        critic_loss = self.critic_loss(obs, action, reward, next_obs, terminated)
        descend(critic_optimizer, critic_loss)
        actor_loss, log_prob = self.actor_loss(obs)
        descend(actor_optimizer, actor_loss + self.temperature_loss(log_prob))
        with torch.no_grad():
            move(self.target, self.critic, self.config.tau)
            move(self.mean_actor, self.actor, self.config.actor_tau)
        losses = dict(critic_loss=critic_loss, actor_loss=actor_loss)
        return losses | dict(temperature=self.log_temperature.exp(), entropy=-log_prob.mean())


def descend(optimizer: torch.optim.Optimizer, loss: Tensor):
    """A step of this optimizer's parameters alone: the actor's loss does not move the critics."""
    optimizer.zero_grad()
    loss.backward(inputs=optimizer.param_groups[0]["params"])
    optimizer.step()


def move(slow: nn.Module, fast: nn.Module, tau: float):
    """slow = (1 - tau) slow + tau fast."""
    torch._foreach_lerp_(list(slow.parameters()), list(fast.parameters()), tau)


# --------------------------------------------------------------------------------------------------
# Playing episodes. T: steps, N: environments.


class Transitions(NamedTuple):
    obs: np.ndarray  # (T, N, O)
    action: np.ndarray  # (T, N, A)
    reward: np.ndarray  # (T, N)
    next_obs: np.ndarray  # (T, N, O)
    terminated: np.ndarray  # (T, N)
    success: np.ndarray  # (T, N) info["success"], or NaN; nothing is learned from it


def rollout(
    envs: VectorEnv, act: Callable, steps: int, reward_fn: Callable | None, seed: int
) -> Transitions:
    """`steps` steps of every environment, from new episodes of seeds seed, seed + 1, and so on.

    The frames of all steps are labelled by one call of reward_fn, frames -> rewards; if it is None,
    a step has the environments' own reward. act: observations (N, O) -> actions (N, A)
    in [-1, 1], which are stretched to the environments' own range. Raises ValueError for NaN.
    """
    low, high = envs.single_action_space.low, envs.single_action_space.high
    played, frames = [], []
    obs = np.copy(envs.reset(seed=seed)[0])  # copies: some environments use an array again
    for _ in range(steps):
        action = act(obs)
        stretched = low + (action + 1) / 2 * (high - low)
        *arrays, truncated, info = envs.step(stretched)
        next_obs, reward, terminated = map(np.copy, arrays)
        success = np.array(info.get("success", [np.nan] * envs.num_envs), dtype=float)
        played.append((obs, action, reward, next_obs, terminated, success))
        if reward_fn is not None:
            # after the step: the frame shows s', and its reward is that of (s, a, s')
            frames.extend(np.copy(frame) for frame in envs.render())
        done = terminated | truncated
        # Where an episode ended early, another begins. (After the last step nobody plays it.)
        obs = np.copy(envs.reset(options={"reset_mask": done})[0]) if done.any() else next_obs
    transitions = Transitions(*(np.stack(values) for values in zip(*played)))
    if reward_fn is not None:
        rewards = label(reward_fn, np.stack(frames))  # (T * N,), in one call
        transitions = transitions._replace(reward=rewards.reshape(steps, envs.num_envs))
    if not all(np.isfinite(x).all() for x in transitions[:4]):
        raise ValueError("observations or rewards of the environments are NaN or infinite")
    return transitions


def label(reward_fn: Callable, frames: np.ndarray) -> np.ndarray:
    """Rewards (B,) of frames (B, H, W, 3). Raises ValueError if they are not B finite numbers."""
    rewards = np.array(reward_fn(frames), dtype=np.float64)
    if rewards.shape != frames.shape[:1] or not np.isfinite(rewards).all():
        given = f"shape {rewards.shape}, {np.isfinite(rewards).mean():.0%} finite"
        raise ValueError(f"rewards of {len(frames)} frames have {given}; wanted is a number each")
    return rewards


def evaluate(
    envs: VectorEnv, act: Callable, reward_fn: Callable | None, episodes: int, seed: int, steps: int
) -> Transitions:
    """`episodes` episodes, of seeds seed, seed + 1, and so on: Transitions with N = episodes."""
    firsts = range(seed, seed + episodes, envs.num_envs)
    parts = [rollout(envs, act, steps, reward_fn, first) for first in firsts]
    return Transitions(*(x[:, :episodes] for x in side_by_side(parts)))


def side_by_side(parts: list[Transitions]) -> Transitions:
    """The environments of all parts, one after the other, along N."""
    return Transitions(*(np.concatenate(x, 1) for x in zip(*parts)))


def pink_noise(rng: np.random.Generator, shape: tuple[int, int, int]) -> np.ndarray:
    """Gaussian noise (T, N, A) of variance 1 whose power over the T steps is 1 / frequency.

    The pushes of white noise cancel out over a few steps. Pink noise pushes a joint the same way
    for longer, so that a body gets somewhere by chance (Eberhard et al. 2023, "Pink Noise Is All
    You Need: Colored Noise Exploration in Deep Reinforcement Learning").
    """
    steps = shape[0]
    # (T,) how often each frequency fits into the T steps; 0, the constant part, counts as 1
    cycles = np.maximum(np.abs(np.fft.fftfreq(steps, 1 / steps)), 1)
    scale = cycles[:, None, None] ** -0.5  # of the amplitude, whose square is the power
    noise = np.fft.ifft(np.fft.fft(rng.standard_normal(shape), axis=0) * scale, axis=0).real
    return noise / np.sqrt((scale**2).mean())


# --------------------------------------------------------------------------------------------------
# Algorithm 1


class Player:
    """Plays rounds and evaluations for `train`, which calls `begin`, and later `finish`.

    It is a queue: `begin` puts a round in, `finish` returns the oldest. Here all playing is done in
    `finish`. The workers of support/workers.py, other processes, play from `begin` on, while
    `train` learns. Both play by the weights given to `begin`, so it makes no difference to a
    training who is faster.

    envs: with autoreset_mode DISABLED, since rollout resets what has ended; ValueError for others.
    reward_fn: frames, uint8 (B, H, W, 3) -> rewards (B,); None for the environments' own. config:
    the training's.
    """

    def __init__(self, envs: VectorEnv, reward_fn: Callable | None, config: Config):
        mode = envs.metadata.get("autoreset_mode")
        if mode != AutoresetMode.DISABLED:
            raise ValueError(f"autoreset_mode is {mode}: make the environments with DISABLED")
        self.envs, self.reward_fn, self.config = envs, reward_fn, config
        self.num_envs, self.jobs = envs.num_envs, []
        spaces = envs.single_observation_space, envs.single_action_space
        self.agent = SAC(*spaces, config)  # acts by the weights it is given, and never learns

    def begin(self, weights: dict, start: int):
        """weights: the state_dict of an agent. start: steps of the training before this round."""
        self.jobs.append((weights, start))

    def forget(self):
        """What was begun by a training that ended early."""
        self.jobs.clear()

    def finish(self) -> tuple[Transitions | None, Transitions | None]:
        """Of what was begun first and not finished yet: the round, and an evaluation or None.

        An evaluation comes with some rounds, of the same weights. When all steps of the training
        are played, it comes alone, with None for the round.
        """
        return self.play(*self.jobs.pop(0))

    def play(self, weights: dict, start: int, first: int = 0, count: int | None = None) -> tuple:
        """What finish returns. A worker (support/workers.py) plays a part of it: of `count`
        environments in all, as many as it has, from number `first` on.
        """
        config, mine, count = self.config, self.envs.num_envs, count or self.envs.num_envs
        self.agent.load_state_dict(weights)
        played = evaluation = None
        if start < config.steps:
            # Each round has a generator of its own, so that a resumed training goes on alike. Its
            # noise is drawn at once, because each step of pink noise depends on the others.
            rng = np.random.default_rng([config.seed, start])
            shape = config.round_steps, count, self.agent.act_size  # (T, N, A), all environments
            pink = start < config.pink * config.steps
            noise = pink_noise(rng, shape) if pink else rng.standard_normal(shape)
            noise = iter(torch.from_numpy(noise[:, first : first + mine]).float())
            act = lambda obs: self.agent.act(obs, next(noise))  # noqa: E731
            # Training shares no seed with evaluations: its own begin at 10^10, those of evaluations
            # (below, the same each time) at 10^9, those of a final judgement at 2 * 10^9.
            seed = 10**10 * (config.seed + 1) + start + first
            played = rollout(self.envs, act, config.round_steps, self.reward_fn, seed)
        if self.is_evaluated(start, config.round_steps * count):
            begin, end = (config.eval_episodes * k // count for k in (first, first + mine))
            seed, act = 10**9 + config.seed + begin, self.agent.deterministic_action
            counts = end - begin, seed, config.round_steps
            evaluation = evaluate(self.envs, act, self.reward_fn, *counts)
        return played, evaluation

    def is_evaluated(self, start: int, round_size: int) -> bool:
        """Whether the weights that play from step `start` on are evaluated.

        The first weights that have learned are, then those after every eval_every steps, and the
        last ones. Not those of the last round: its row is for the last ones, which play no round.
        """
        since = start - self.config.learning_starts - round_size
        every = max(self.config.eval_every, self.config.steps // 32)
        due = since >= 0 and since % every < round_size
        return start >= self.config.steps or due and start + round_size < self.config.steps


class Progress:
    """All that a training is made of besides its agent. Saved between rounds, it can be resumed.

    round_size: environment steps in a round.
    """

    def __init__(self, agent: SAC, round_size: int):
        size = min(agent.config.buffer_size, agent.config.steps + round_size)  # all, if it fits
        self.buffer = ReplayBuffer(size, agent.obs_size, agent.act_size)
        self.steps, self.weights = 0, copy.deepcopy(agent.state_dict())  # what plays the next round
        self.best_reward, self.best = -math.inf, None  # of evaluations, and the weights evaluated


def train(agent: SAC, player: Player, progress: Progress | None = None) -> Iterator[dict]:
    """Algorithm 1. Yields a dict after each round. At the end the agent has its best weights.

        until all steps are played:
            play a round with the policy: observations, actions, frames        rollout
            label all frames at once: rewards                                  reward_fn
            put the transitions into the replay buffer                         buffer.add
            after the first steps: update the networks, from random batches    learn
            now and then: let the policy without its randomness play some
            episodes apart, and keep the weights that earn most in these       evaluate

    player: plays and labels. Evaluations, of the deterministic policy, choose the best weights by
    reward alone. progress: where to resume.

    In the dict: "steps"; "reward", the mean of a step; "success" (environments, round_steps), at
    each step; once it learns, "critic_loss", "actor_loss", "temperature" and "entropy" of the last
    update. Where the weights that played the round were evaluated: "eval_reward", "eval_success"
    (episodes, round_steps), and "best" if they are the best so far. In the last dict these three
    are of the last weights. Raises ValueError if learning diverges, and for NaN from environments.
    """
    config, round_size = agent.config, agent.config.round_steps * player.num_envs
    progress = progress or Progress(agent, round_size)
    player.forget()
    player.begin(progress.weights, progress.steps)
    for start in range(progress.steps, config.steps, round_size):
        # Playing is one round ahead of learning: the next round begins with the weights of now,
        # before this one is learned from. What is learned below first plays the round after that.
        steps, weights = start + round_size, progress.weights
        progress.steps, progress.weights = steps, copy.deepcopy(agent.state_dict())
        if steps < config.steps:
            player.begin(progress.weights, steps)
        played, evaluation = player.finish()
        row = dict(steps=steps, reward=float(played.reward.mean()), success=played.success.T)

        # Move the transitions to the replay buffer.
        columns = [x.reshape(round_size, -1) for x in played[:5]]  # all but success
        rows = torch.from_numpy(np.concatenate(columns, 1, dtype=np.float32))
        progress.buffer.add(rows)
        agent.norm.update(rows[:, : agent.obs_size].to(agent.device))

        # Learn, at a falling learning rate, so that the policy comes to rest.
        if steps >= config.learning_starts:
            torch.manual_seed(10**10 * config.seed + start)  # for batches and the policy's noise
            learning_rate = config.learning_rate * (1 - start / config.steps)
            updates = max(1, round(round_size * config.updates_per_step))
            losses = learn(agent, progress.buffer, updates, learning_rate)
            if not all(math.isfinite(loss) for loss in losses.values()):
                raise ValueError(f"learning diverged within {steps} steps. Lower the learning_rate")
            row |= losses

        # Keep the best weights of those evaluated, which played this round. After the last round
        # the last weights are evaluated too, and kept if they are best.
        if steps >= config.steps:
            weights = progress.weights = copy.deepcopy(agent.state_dict())
            player.begin(weights, steps)
            evaluation = player.finish()[1]
        if evaluation is not None:
            row |= dict(eval_reward=float(evaluation.reward.mean()))
            row |= dict(eval_success=evaluation.success.T)
            if row["eval_reward"] > progress.best_reward:
                progress.best_reward, progress.best, row["best"] = row["eval_reward"], weights, True
        yield row
    agent.load_state_dict(progress.best)


def learn(agent: SAC, buffer: ReplayBuffer, updates: int, learning_rate: float) -> dict[str, float]:
    """Updates the agent so many times. Returns what the last update did."""
    for optimizer in agent.optimizers:
        optimizer.param_groups[0]["lr"] = learning_rate
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")  # bf16 or tf32 where the hardware has them
    for _ in range(updates):
        losses = agent.update(*buffer.sample(agent.config.batch_size, agent.device))
    torch.set_float32_matmul_precision(precision)
    return {name: loss.item() for name, loss in losses.items()}


def main():
    import gymnasium

    def make():
        return gymnasium.make("Pendulum-v1")  # an episode is 200 steps; its return is at most 0

    envs = gymnasium.vector.SyncVectorEnv([make] * 8, autoreset_mode=AutoresetMode.DISABLED)
    settings = dict(steps=16_000, learning_starts=1_600, round_steps=200, updates_per_step=0.5)
    settings |= dict(batch_size=128, gamma=0.97, learning_rate=2e-3, init_temperature=0.5)
    config = Config(**settings, hidden=64, actor_tau=0.05)  # smaller and faster than the humanoid's
    agent = SAC(envs.single_observation_space, envs.single_action_space, config)
    for row in train(agent, Player(envs, None, config)):
        if "eval_reward" in row:
            print(f"{row['steps']:6} steps, return {200 * row['eval_reward']:6.0f}")
    played = evaluate(envs, agent.deterministic_action, None, 32, 2 * 10**9, 200)
    print(f"the best of these policies, in 32 new episodes: {played.reward.sum(0).mean():.0f}")


if __name__ == "__main__":
    main()
