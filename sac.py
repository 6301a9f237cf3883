"""Soft Actor-Critic that learns from a function of frames: Algorithm 1 of the VLM-RM paper, from nothing but PyTorch.

The loop knows nothing of CLIP. Many environments step together for a round and keep what they saw; then the round's
frames are labelled in one batch by `reward_fn(frames) -> rewards`, which is what makes a big vision model affordable;
then SAC updates its networks from a replay buffer of labelled transitions. For Gymnasium vector environments that draw
frames and leave the reset to their caller:

    agent = SAC(envs.single_observation_space, envs.single_action_space, Config(steps=100_000))
    for row in train(agent, envs, eval_envs, reward_fn):  # one row of numbers a round
        print(row)                                        # at the end, the agent is its best checkpoint

SAC (Haarnoja et al. 2018, "Soft Actor-Critic Algorithms and Applications", arXiv:1812.05905) in short: a critic Q(s, a)
estimates the discounted sum of future rewards, plus a temperature times the entropy of the policy, so that trying
things out is worth something. The actor learns to choose actions that the critic values; the temperature is tuned to
hold the entropy at a target. The smaller of two critics, and slow copies of both, keep the estimates sober.
"""
import copy
import math
from dataclasses import dataclass, field

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F


def setting(default, meaning: str):
    return field(default=default, metadata=dict(help=meaning))


@dataclass
class Config:
    """Hyperparameters, chosen for minutes on a laptop. [In brackets: the paper's, for days on 4 GPUs, if different.]

    Not in the paper's SAC either: standardised observations, layer norm in the critics, the averaged actor, the choice
    of the checkpoint by deterministic episodes rather than by training reward.
    """

    steps: int = setting(100_000, "environment steps in all [10 million]")
    learning_starts: int = setting(4_800, "random steps before the first update [50,000]")
    round_steps: int = setting(100, "steps of an episode, and of each environment between two labellings")
    updates_per_step: float = setting(0.25, "gradient updates for each environment step [1]")
    batch_size: int = setting(256, "transitions in an update [512]")
    buffer_size: int = setting(1_000_000, "transitions that the replay buffer remembers")
    gamma: float = setting(0.95, "discount of the next step's value")
    tau: float = setting(0.005, "share of the critics that moves into their targets at an update")
    actor_tau: float = setting(0.001, "share of the actor that moves into its average, which is what is judged [1]")
    learning_rate: float = setting(6e-4, "of Adam, at the start; it falls linearly to zero [constant]")
    init_temperature: float = setting(0.1, "weight of entropy at the start; it is learned from there [1]")
    hidden: int = setting(256, "width of the two hidden layers of each network")
    eval_every: int = setting(3_200, "steps between deterministic evaluations; the best by reward is kept")
    eval_episodes: int = setting(16, "episodes in such an evaluation")
    seed: int = setting(0, "of everything random")

    def __post_init__(self):
        for name, value in vars(self).items():
            if name != "seed" and not value > 0:
                raise ValueError(f"{name} is {value}; it has to be above 0")


# ----------------------------------------------------------------------------------------------------------------------
# Networks


class RunningNorm(nn.Module):
    """Standardises observations by the mean and variance of all seen so far, and clips them to +-10."""

    def __init__(self, size: int):
        super().__init__()
        self.register_buffer("mean", torch.zeros(size))
        self.register_buffer("var", torch.ones(size))
        self.register_buffer("count", torch.zeros(()))

    def update(self, x):  # (B, O): merge the moments of two samples, Chan et al.
        count = self.count + len(x)
        delta = x.mean(0) - self.mean
        self.var += (x.var(0, correction=0) - self.var) * len(x) / count + delta**2 * self.count * len(x) / count**2
        self.mean += delta * len(x) / count
        self.count += len(x)

    def forward(self, x):
        return ((x - self.mean) / (self.var + 1e-8).sqrt()).clamp(-10, 10)


class Actor(nn.Module):
    """The policy pi(a|s): a Gaussian u ~ N(mean, std), squashed, a = tanh(u). Actions lie in (-1, 1)."""

    def __init__(self, obs_size: int, act_size: int, hidden: int):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(obs_size, hidden), nn.ReLU(), nn.Linear(hidden, hidden), nn.ReLU())
        self.head = nn.Linear(hidden, 2 * act_size)

    def forward(self, obs, deterministic: bool = False):
        """obs (B, O) -> action (B, A), log_prob (B,) = log pi(action | obs)."""
        mean, log_std = self.head(self.body(obs)).chunk(2, -1)
        log_std = log_std.clamp(-20, 2)
        noise = torch.zeros_like(mean) if deterministic else torch.randn_like(mean)
        u = mean + log_std.exp() * noise
        log_prob = (-0.5 * noise**2 - log_std - 0.5 * math.log(2 * math.pi)).sum(-1)  # log N(u; mean, std)
        # change of variables, - log|da/du| = - log(1 - tanh(u)^2), in a form safe for large |u| (1812.05905, App. C)
        log_prob = log_prob - 2 * (math.log(2) - u - F.softplus(-2 * u)).sum(-1)
        return u.tanh(), log_prob


class TwinCritic(nn.Module):
    """Q1(s, a) and Q2(s, a): two separate networks whose weights are stacked, so that one matmul evaluates both."""

    def __init__(self, obs_size: int, act_size: int, hidden: int):
        super().__init__()
        sizes = [obs_size + act_size, hidden, hidden, 1]
        bound = [1 / math.sqrt(n) for n in sizes]  # nn.Linear's initialisation
        weights = [torch.empty(2, i, o).uniform_(-k, k) for i, o, k in zip(sizes, sizes[1:], bound)]
        biases = [torch.empty(2, 1, o).uniform_(-k, k) for o, k in zip(sizes[1:], bound)]
        self.weights, self.biases = nn.ParameterList(weights), nn.ParameterList(biases)

    def forward(self, obs, action):
        """obs (B, O), action (B, A) -> (2, B)."""
        x = torch.cat([obs, action], -1).expand(2, -1, -1)  # (2, B, O + A)
        for i, (weight, bias) in enumerate(zip(self.weights, self.biases)):
            x = torch.baddbmm(bias, x, weight)  # (2, B, hidden), at last (2, B, 1)
            if i < 2:
                x = F.relu(F.layer_norm(x, x.shape[-1:]))  # layer norm keeps the values from diverging
        return x.squeeze(-1)


class ReplayBuffer:
    """D, the labelled transitions (s, a, r, s', terminated), the oldest overwritten first; in the CPU's memory."""

    def __init__(self, size: int, obs_size: int, act_size: int):
        self.size, self.next, self.full = size, 0, False
        self.data = [torch.zeros(size, n) for n in (obs_size, act_size, 1, obs_size, 1)]

    def __len__(self):
        return self.size if self.full else self.next

    def add(self, *columns):  # each (n, width)
        where = (self.next + torch.arange(len(columns[0]))) % self.size
        for store, column in zip(self.data, columns):
            store[where] = column
        self.full |= self.next + len(where) >= self.size
        self.next = (self.next + len(where)) % self.size

    def sample(self, batch_size: int):
        where = torch.randint(len(self), (batch_size,))
        return [store[where] for store in self.data]


# ----------------------------------------------------------------------------------------------------------------------
# The algorithm


class SAC(nn.Module):
    """Actor, twin critics, their slow copies, the temperature, and one gradient update of them all."""

    def __init__(self, observation_space, action_space, config: Config, device="cpu"):
        super().__init__()
        torch.manual_seed(config.seed)
        obs_size, act_size = observation_space.shape[0], action_space.shape[0]
        self.config, self.device = config, device
        self.norm = RunningNorm(obs_size)
        self.actor = Actor(obs_size, act_size, config.hidden)
        self.mean_actor = copy.deepcopy(self.actor).requires_grad_(False)  # over recent updates: single ones swing
        self.critic = TwinCritic(obs_size, act_size, config.hidden)
        self.target = copy.deepcopy(self.critic).requires_grad_(False)
        self.log_temperature = nn.Parameter(torch.tensor(math.log(config.init_temperature)))
        self.target_entropy = -float(act_size)  # the usual choice: -dim(A)
        self.to(device)
        self.optimizers = [torch.optim.Adam(parameters, config.learning_rate, fused=True) for parameters in (
            self.critic.parameters(), self.actor.parameters(), [self.log_temperature])]

    @torch.no_grad()
    def act(self, obs, deterministic: bool = False) -> np.ndarray:
        """Observations (N, O), raw -> actions (N, A) in (-1, 1): a sample of the policy, or its averaged centre."""
        obs = torch.as_tensor(obs, dtype=torch.float32, device=self.device)
        actor = self.mean_actor if deterministic else self.actor
        return actor(self.norm(obs), deterministic)[0].cpu().numpy()

    def best_action(self, obs) -> np.ndarray:
        return self.act(obs, deterministic=True)

    def critic_loss(self, obs, action, reward, next_obs, terminated):
        """Mean squared soft Bellman error. Only `terminated` cuts the future off: a truncated episode would go on."""
        with torch.no_grad():
            next_action, next_log_prob = self.actor(next_obs)
            next_q = self.target(next_obs, next_action).min(0).values  # (B,) the more cautious of two
            next_value = next_q - self.log_temperature.exp() * next_log_prob  # V(s'), soft: entropy counts
            target = reward + self.config.gamma * (1 - terminated) * next_value  # (B,)
        return (self.critic(obs, action) - target).square().mean(1).sum()  # mean over the batch, sum over critics

    def actor_loss(self, obs):
        """E[temperature log pi(a|s) - min Q(s, a)], and the log_prob (B,) that the temperature needs."""
        action, log_prob = self.actor(obs)
        q = self.critic(obs, action).min(0).values
        return (self.log_temperature.exp().detach() * log_prob - q).mean(), log_prob.detach()

    def temperature_loss(self, log_prob):
        """Raises the temperature while the policy's entropy is under its target, lowers it while over."""
        return -(self.log_temperature.exp() * (log_prob + self.target_entropy)).mean()

    def update(self, obs, action, reward, next_obs, terminated) -> dict:
        """One gradient step for all, on a batch: raw observations (B, O), actions (B, A), the rest (B,)."""
        critic_optimizer, actor_optimizer, temperature_optimizer = self.optimizers
        obs, next_obs = self.norm(obs), self.norm(next_obs)
        critic_loss = self.critic_loss(obs, action, reward, next_obs, terminated)
        descend(critic_optimizer, critic_loss)
        actor_loss, log_prob = self.actor_loss(obs)
        descend(actor_optimizer, actor_loss)
        descend(temperature_optimizer, self.temperature_loss(log_prob))
        with torch.no_grad():
            for slow, fast, tau in ((self.target, self.critic, self.config.tau),
                                    (self.mean_actor, self.actor, self.config.actor_tau)):
                torch._foreach_lerp_(list(slow.parameters()), list(fast.parameters()), tau)
        return dict(critic_loss=critic_loss, actor_loss=actor_loss, temperature=self.log_temperature.exp(),
                    entropy=-log_prob.mean())


def descend(optimizer, loss):
    parameters = optimizer.param_groups[0]["params"]
    optimizer.zero_grad()
    loss.backward(inputs=parameters)  # the actor's loss runs through the critics: their gradients are not wanted
    optimizer.step()


def rollout(envs, obs, act, steps, reward_fn):
    """`steps` steps of every environment from observations `obs`, then all their frames labelled in one batch.

    act: observations (N, O) -> actions (N, A) in [-1, 1], which are stretched to the environments' own range. Returns
    the columns obs, action, reward, next_obs, terminated, done, success, each (steps, N, ...), and the observations
    to go on from. success is info["success"], NaN without one. Without a reward_fn: the environment's own reward.
    """
    low, high, columns, frames = envs.single_action_space.low, envs.single_action_space.high, [], []
    for _ in range(steps):
        action = act(obs)
        next_obs, reward, terminated, truncated, info = envs.step(low + (action + 1) / 2 * (high - low))
        done = terminated | truncated
        success = np.array(info.get("success", [np.nan] * envs.num_envs), dtype=float)
        columns.append((obs, action, reward, next_obs, terminated, done, success))
        if reward_fn is not None:
            frames.extend(envs.render())  # after the action: R(s, a, s') depends on s' alone (Lemma 1)
        obs = envs.reset(options={"reset_mask": done})[0] if done.any() else next_obs
    columns = [np.stack(column) for column in zip(*columns)]
    if reward_fn is not None:
        columns[2] = np.asarray(reward_fn(np.stack(frames))).reshape(steps, envs.num_envs)
    return columns, obs


def evaluate(envs, act, reward_fn, episodes: int, seed: int, episode_steps: int):
    """Mean reward of each episode, (episodes,), and success at each step, (episodes, episode_steps).

    Episodes start from seeds seed, seed + 1, ..., and are episode_steps long: only truncation ends them.
    """
    rewards, successes = [], []
    for first in range(0, episodes, envs.num_envs):
        obs, _ = envs.reset(seed=seed + first)
        (_, _, reward, _, _, _, success), _ = rollout(envs, obs, act, episode_steps, reward_fn)
        rewards.extend(reward.mean(0))
        successes.extend(success.T)
    return np.array(rewards[:episodes]), np.array(successes[:episodes])


def train(agent: SAC, envs, eval_envs, reward_fn):
    """Algorithm 1. Yields a dict of numbers after each round; at the end the agent is its best checkpoint.

    envs, eval_envs: vector environments made with autoreset_mode=DISABLED; eval_envs serve only the deterministic
    evaluations that choose the checkpoint, by reward alone. reward_fn: uint8 frames (B, H, W, 3) -> rewards (B,).
    """
    config, rng = agent.config, np.random.default_rng(agent.config.seed)
    (obs_size,), (act_size,) = envs.single_observation_space.shape, envs.single_action_space.shape
    room = min(config.buffer_size, config.steps + config.round_steps * envs.num_envs)
    buffer = ReplayBuffer(room, obs_size, act_size)

    def explore(obs):
        return agent.act(obs) if steps >= config.learning_starts else rng.uniform(-1, 1, envs.action_space.shape)

    steps, best_reward, best, next_eval = 0, -math.inf, None, config.learning_starts
    obs, _ = envs.reset(seed=config.seed)
    while steps < config.steps:
        # act, into the unlabelled buffer B; label its frames; move it to D
        (*transitions, done, success), obs = rollout(envs, obs, explore, config.round_steps, reward_fn)
        steps += done.size
        transitions = [torch.as_tensor(x.reshape(done.size, -1), dtype=torch.float32) for x in transitions]
        buffer.add(*transitions)
        agent.norm.update(transitions[0].to(agent.device))
        row = dict(steps=steps, reward=transitions[2].mean().item(), success=success.T)
        # learn
        if steps >= config.learning_starts:
            for optimizer in agent.optimizers:  # smaller and smaller steps, so that the policy comes to rest
                optimizer.param_groups[0]["lr"] = config.learning_rate * max(0, 1 - steps / config.steps)
            precision = torch.get_float32_matmul_precision()
            torch.set_float32_matmul_precision("medium")  # bf16 or tf32 matmuls where the hardware has them
            for _ in range(max(1, round(done.size * config.updates_per_step))):
                o, a, r, o2, d = (x.to(agent.device) for x in buffer.sample(config.batch_size))
                losses = agent.update(o, a, r.squeeze(-1), o2, d.squeeze(-1))
            torch.set_float32_matmul_precision(precision)
            row |= {key: value.item() for key, value in losses.items()}
        # judge, and keep the best
        if steps >= next_eval or steps >= config.steps:
            next_eval = steps + config.eval_every
            rewards, successes = evaluate(eval_envs, agent.best_action, reward_fn, config.eval_episodes,
                                          seed=10**9 + config.seed, episode_steps=config.round_steps)
            row |= dict(eval_reward=float(rewards.mean()), eval_success=successes)
            if row["eval_reward"] > best_reward:
                best_reward, best, row["best"] = row["eval_reward"], copy.deepcopy(agent.state_dict()), True
        yield row
    agent.load_state_dict(best)
