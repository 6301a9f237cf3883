"""Soft Actor-Critic that learns from a function of frames: Algorithm 1 of the VLM-RM paper, in plain PyTorch.

The loop knows nothing of CLIP. Many environments step together for a round, an episode of each, and keep what they saw;
then all those frames are labelled in one call of `reward_fn(frames) -> rewards`, which is what makes a big vision
model affordable; then SAC updates its networks from a replay buffer of labelled transitions. For Gymnasium vector
environments that draw frames and leave the reset to their caller:

    agent = SAC(envs.single_observation_space, envs.single_action_space, Config(steps=100_000))
    for row in train(agent, envs, eval_envs, reward_fn):  # a dict of what was measured, after each round
        print(row["steps"], row["reward"])                # at the end, the agent is its best checkpoint

SAC (Haarnoja et al. 2018, "Soft Actor-Critic Algorithms and Applications", arXiv:1812.05905) in short: a critic Q(s, a)
estimates the discounted sum of future rewards, plus a temperature times the entropy of the policy, so that trying
things out is worth something. The actor learns to choose actions that the critic values; the temperature is tuned to
hold the entropy at a target. The smaller of two critics, and slow copies of both, keep the estimates sober.
"""

import contextlib
import copy
import io
import math
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, fields
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from gymnasium.spaces import Box
from gymnasium.vector import AutoresetMode, VectorEnv
from torch import Tensor


def setting(default: float, meaning: str):
    return field(default=default, metadata=dict(help=meaning))


@dataclass
class Config:
    """Hyperparameters, chosen for minutes on two CPU cores. [In brackets: the paper's, for 4 GPUs, if different.]

    Also not in the paper's SAC: standardised observations, layer norm in the critics, the averaged actor, the choice
    of the checkpoint by deterministic episodes rather than by training reward; and pink noise, if asked for.
    """

    steps: int = setting(100_000, "environment steps in all [10 million]")
    learning_starts: int = setting(4_800, "steps before the first update, by the untrained policy [50,000, random]")
    round_steps: int = setting(100, "steps of an episode, and of each environment between two labellings")
    updates_per_step: float = setting(0.25, "gradient updates for each environment step [1/32: 100 for 3,200 steps]")
    batch_size: int = setting(256, "transitions in an update [512]")
    buffer_size: int = setting(1_000_000, "transitions that the replay buffer remembers")
    pink: float = setting(0.0, "share of the run, from its start, that explores with pink noise instead of white")
    gamma: float = setting(0.95, "discount of the next step's value")
    tau: float = setting(0.005, "share of the critics that moves into their targets at an update")
    actor_tau: float = setting(0.001, "share of the actor that moves into its average, which is what is judged [1]")
    learning_rate: float = setting(6e-4, "of Adam, at the start; it falls linearly towards zero [constant]")
    init_temperature: float = setting(0.1, "weight of entropy at the start; it is learned from there [1]")
    hidden: int = setting(256, "width of the two hidden layers of each network")
    eval_every: int = setting(3_200, "steps between evaluations, at least a 32nd of all; the best by reward is kept")
    eval_episodes: int = setting(16, "episodes in such an evaluation")
    seed: int = setting(0, "of everything random")

    def __post_init__(self):
        # Episodes' seeds never meet: training has 10**10 * (seed + 1) and more, evaluations 10**9 + seed and more, the
        # judgements and videos of vlmrm.py 2 * 10**9 and more
        most = dict(pink=1, gamma=1, tau=1, actor_tau=1, seed=10**8)
        for option in fields(self):
            name, value = option.name, getattr(self, option.name)
            may_be_0 = name in ("pink", "seed")
            if not (math.isfinite(value) and (value > 0 or may_be_0 and value == 0) and value <= most.get(name, value)):
                least = "at least 0" if may_be_0 else "above 0"
                limit = f" and at most {most[name]}" if name in most else ""
                raise ValueError(f"{name} is {value}; it has to be finite, {least}{limit}")
            if option.type is int and value != int(value):
                raise ValueError(f"{name} is {value}; it has to be a whole number")
            setattr(self, name, option.type(value))  # 1e6 is a whole number too


# ----------------------------------------------------------------------------------------------------------------------
# Networks


class RunningNorm(nn.Module):
    """Standardises observations by the mean and variance of all seen so far, and clips them to +-10."""

    def __init__(self, size: int):
        super().__init__()
        self.register_buffer("mean", torch.zeros(size))
        self.register_buffer("var", torch.ones(size))
        self.register_buffer("count", torch.zeros(()))

    def update(self, x: Tensor):  # (B, O): merge the moments of two samples, Chan et al.
        count = self.count + len(x)
        delta = x.mean(0) - self.mean
        self.var += (x.var(0, correction=0) - self.var) * len(x) / count + delta**2 * self.count * len(x) / count**2
        self.mean += delta * len(x) / count
        self.count += len(x)

    def forward(self, x: Tensor) -> Tensor:
        return ((x - self.mean) / (self.var + 1e-8).sqrt()).clamp(-10, 10)


class Actor(nn.Module):
    """The policy pi(a|s): a Gaussian u ~ N(mean, std), squashed, a = tanh(u). Actions lie in (-1, 1)."""

    def __init__(self, obs_size: int, act_size: int, hidden: int):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(obs_size, hidden), nn.ReLU(), nn.Linear(hidden, hidden), nn.ReLU())
        self.head = nn.Linear(hidden, 2 * act_size)

    def forward(self, obs: Tensor, noise: Tensor | float | None = None) -> tuple[Tensor, Tensor]:
        """obs (B, O) -> action (B, A), log_prob (B,) = log pi(action | obs). noise (B, A): left out, N(0, 1)."""
        mean, log_std = self.head(self.body(obs)).chunk(2, -1)
        log_std = log_std.clamp(-20, 2)
        noise = torch.randn_like(mean) if noise is None else noise
        u = mean + log_std.exp() * noise
        log_prob = (-0.5 * noise**2 - log_std - 0.5 * math.log(2 * math.pi)).sum(-1)  # log N(u; mean, std)
        # change of variables, - log|da/du| = - log(1 - tanh(u)^2), in a form safe for large |u| (1812.05905, App. C)
        log_prob = log_prob - 2 * (math.log(2) - u - F.softplus(-2 * u)).sum(-1)
        return u.tanh(), log_prob


class TwinCritic(nn.Module):
    """Q1(s, a) and Q2(s, a): two separate networks. Layer norm keeps their values from diverging.

    The norm has no learned scale: its gradient is a sum whose order, and so last bits, depend on the number of threads.
    """

    def __init__(self, obs_size: int, act_size: int, hidden: int):
        super().__init__()

        def layer(inputs):
            return nn.Linear(inputs, hidden), nn.LayerNorm(hidden, elementwise_affine=False), nn.ReLU()

        self.q1, self.q2 = (
            nn.Sequential(*layer(obs_size + act_size), *layer(hidden), nn.Linear(hidden, 1)) for _ in range(2)
        )

    def forward(self, obs: Tensor, action: Tensor) -> Tensor:
        """obs (B, O), action (B, A) -> (2, B)."""
        x = torch.cat([obs, action], -1)
        return torch.stack([self.q1(x), self.q2(x)]).squeeze(-1)


class ReplayBuffer:
    """D, the labelled transitions (s, a, r, s', terminated), the oldest overwritten first; in the CPU's memory."""

    def __init__(self, size: int, obs_size: int, act_size: int):
        self.size, self.next, self.full = size, 0, False
        self.widths = [obs_size, act_size, 1, obs_size, 1]
        self.data = torch.zeros(size, sum(self.widths))

    def __len__(self):
        return self.size if self.full else self.next

    def add(self, rows: Tensor):  # (n, all widths)
        where = (self.next + torch.arange(len(rows))) % self.size
        self.data[where] = rows
        self.full |= self.next + len(rows) >= self.size
        self.next = (self.next + len(rows)) % self.size

    def sample(self, batch_size: int, device: str = "cpu") -> tuple[Tensor, ...]:
        """A random batch: obs (B, O), action (B, A), reward (B,), next_obs (B, O), terminated (B,)."""
        rows = self.data[torch.randint(len(self), (batch_size,))].to(device)  # one copy, one transfer
        obs, action, reward, next_obs, terminated = rows.split(self.widths, 1)
        return obs, action, reward.squeeze(1), next_obs, terminated.squeeze(1)


# ----------------------------------------------------------------------------------------------------------------------
# The algorithm


class SAC(nn.Module):
    """Actor, twin critics, their slow copies, the temperature, and one gradient update of them all."""

    def __init__(self, observation_space: Box, action_space: Box, config: Config, device: str = "cpu"):
        super().__init__()
        for space in observation_space, action_space:
            if not isinstance(space, Box) or len(space.shape) != 1:
                raise ValueError(f"a space is {space}; observations and actions have to be Boxes of one dimension")
        torch.manual_seed(config.seed)
        obs_size, act_size = observation_space.shape[0], action_space.shape[0]
        self.config, self.device = config, device
        self.norm = RunningNorm(obs_size)
        self.actor = Actor(obs_size, act_size, config.hidden)
        self.mean_actor = copy.deepcopy(self.actor).requires_grad_(False)  # an average, for updates swing
        self.critic = TwinCritic(obs_size, act_size, config.hidden)
        self.target = copy.deepcopy(self.critic).requires_grad_(False)
        self.log_temperature = nn.Parameter(torch.tensor(math.log(config.init_temperature)))
        self.target_entropy = -float(act_size)  # the usual choice: -dim(A)
        self.to(device)
        trained = self.critic.parameters(), [*self.actor.parameters(), self.log_temperature]
        self.optimizers = [torch.optim.Adam(some, config.learning_rate, fused=True) for some in trained]

    @torch.no_grad()
    def act(self, obs: np.ndarray, noise: Tensor | None = None) -> np.ndarray:
        """Observations (N, O), raw -> actions (N, A) in (-1, 1): a sample of the policy. noise as in the actor."""
        obs = torch.as_tensor(obs, dtype=torch.float32, device=self.device)
        return self.actor(self.norm(obs), noise)[0].cpu().numpy()

    @torch.no_grad()
    def best_action(self, obs: np.ndarray) -> np.ndarray:
        """Observations (N, O), raw -> actions (N, A) in (-1, 1): the centre of the averaged policy."""
        obs = torch.as_tensor(obs, dtype=torch.float32, device=self.device)
        return self.mean_actor(self.norm(obs), noise=0)[0].cpu().numpy()

    def critic_loss(self, obs: Tensor, action: Tensor, reward: Tensor, next_obs: Tensor, terminated: Tensor) -> Tensor:
        """Mean squared soft Bellman error, of normalised observations.

        Only `terminated` cuts the future off: a truncated episode would go on.
        """
        with torch.no_grad():
            next_action, next_log_prob = self.actor(next_obs)
            next_q = self.target(next_obs, next_action).min(0).values  # (B,) the more cautious of two
            next_value = next_q - self.log_temperature.exp() * next_log_prob  # V(s'), soft: entropy counts
            target = reward + self.config.gamma * (1 - terminated) * next_value  # (B,)
        return (self.critic(obs, action) - target).square().mean(1).sum()  # mean over the batch, sum over critics

    def actor_loss(self, obs: Tensor) -> tuple[Tensor, Tensor]:
        """E[temperature log pi(a|s) - min Q(s, a)], normalised s, and the log_prob (B,) that the temperature needs."""
        action, log_prob = self.actor(obs)
        q = self.critic(obs, action).min(0).values
        return (self.log_temperature.exp().detach() * log_prob - q).mean(), log_prob.detach()

    def temperature_loss(self, log_prob: Tensor) -> Tensor:
        """Pushes the temperature up while the policy's entropy is under its target, down while over."""
        return -(self.log_temperature.exp() * (log_prob + self.target_entropy)).mean()

    def update(self, obs: Tensor, action: Tensor, reward: Tensor, next_obs: Tensor, terminated: Tensor) -> dict:
        """One gradient step for all, on a batch: raw observations (B, O), actions (B, A), the rest (B,)."""
        critic_optimizer, actor_optimizer = self.optimizers
        obs, next_obs = self.norm(obs), self.norm(next_obs)
        critic_loss = self.critic_loss(obs, action, reward, next_obs, terminated)
        descend(critic_optimizer, critic_loss)
        actor_loss, log_prob = self.actor_loss(obs)
        descend(actor_optimizer, actor_loss + self.temperature_loss(log_prob))  # no parameter is in both
        with torch.no_grad():
            for slow, fast, tau in (
                (self.target, self.critic, self.config.tau),
                (self.mean_actor, self.actor, self.config.actor_tau),
            ):
                torch._foreach_lerp_(list(slow.parameters()), list(fast.parameters()), tau)
        temperature, entropy = self.log_temperature.exp(), -log_prob.mean()
        return dict(critic_loss=critic_loss, actor_loss=actor_loss, temperature=temperature, entropy=entropy)


def descend(optimizer: torch.optim.Optimizer, loss: Tensor):
    """One step of an optimizer's own parameters down the gradient of the loss."""
    parameters = optimizer.param_groups[0]["params"]
    optimizer.zero_grad()
    loss.backward(inputs=parameters)  # the actor's loss runs through the critics: their gradients are not wanted
    if dist.is_initialized():  # each process has a share of the batch: from here on, its gradient is that of the whole
        gradients = [parameter.grad for parameter in parameters]
        whole = nn.utils.parameters_to_vector(gradients)
        dist.all_reduce(whole)
        nn.utils.vector_to_parameters(whole / dist.get_world_size(), gradients)
    optimizer.step()


def processes() -> tuple[int, int]:
    """This process' number, and how many there are: (0, 1) unless torch.distributed has been initialised."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def gather(x: np.ndarray) -> np.ndarray:
    """The arrays of all processes, one after the other along the first axis."""
    if not dist.is_initialized():
        return x
    parts = [None] * dist.get_world_size()
    dist.all_gather_object(parts, x)
    return np.concatenate(parts)


def label(reward_fn: Callable, frames: np.ndarray) -> np.ndarray:
    """The rewards of frames, (B,) float64. Raises ValueError unless the function returns one finite number a frame."""
    rewards = np.array(reward_fn(frames), dtype=np.float64)
    if rewards.shape != frames.shape[:1] or not np.isfinite(rewards).all():
        given = f"rewards of shape {rewards.shape} for {len(frames)} frames, {np.isfinite(rewards).mean():.0%} finite"
        raise ValueError(f"the reward function returned {given}; wanted is one for each, none NaN or infinite")
    return rewards


def pink_noise(rng: np.random.Generator, shape: tuple[int, int, int]) -> np.ndarray:
    """Gaussian noise (T, N, A) of variance 1 whose power falls as 1 / frequency, over T steps, in each of N x A places.

    White noise makes a body tremble: from one step to the next it takes back what it did. This also pushes a joint the
    same way for many steps, so that the robot gets somewhere by chance (Eberhard et al. 2023, "Pink Noise Is All You
    Need: Colored Noise Exploration in Deep Reinforcement Learning").
    """
    steps = shape[0]
    frequency = np.maximum(np.abs(np.fft.fftfreq(steps, 1 / steps)), 1)  # (T,) 0, 1, 2, ... periods in T; for 0 take 1
    scale = frequency[:, None, None] ** -0.5  # of the amplitude, whose square is the power
    noise = np.fft.ifft(np.fft.fft(rng.standard_normal(shape), axis=0) * scale, axis=0).real
    return noise / np.sqrt((scale**2).mean())


def rollout(envs: VectorEnv, act: Callable, steps: int, reward_fn: Callable | None, seed: int) -> list[np.ndarray]:
    """`steps` steps of every environment, from fresh episodes (seeds seed, seed + 1, ...), labelled in one call.

    act: observations (N, O) -> actions (N, A) in [-1, 1], which are stretched to the environments' own range. Returns
    the columns obs, action, reward, next_obs, terminated, success, each (steps, N, ...). success is info["success"],
    NaN without one. Without a reward_fn: the environment's own reward.
    """
    low, high, columns, frames = envs.single_action_space.low, envs.single_action_space.high, [], []
    obs, _ = envs.reset(seed=seed)
    for _ in range(steps):
        action = act(obs)
        next_obs, reward, terminated, truncated, info = envs.step(low + (action + 1) / 2 * (high - low))
        done = terminated | truncated
        success = np.array(info.get("success", [np.nan] * envs.num_envs), dtype=float)
        columns.append((obs, action, reward, next_obs, terminated, success))
        if reward_fn is not None:
            frames.extend(envs.render())  # after the action: R(s, a, s') depends on s' alone (VLM-RM, Lemma 1)
        obs = envs.reset(options={"reset_mask": done})[0] if done.any() else next_obs
    columns = [np.stack(column) for column in zip(*columns)]
    if reward_fn is not None:
        columns[2] = label(reward_fn, np.stack(frames)).reshape(steps, envs.num_envs)
    return columns


def evaluate(
    envs: VectorEnv, act: Callable, reward_fn: Callable | None, episodes: int, seed: int, episode_steps: int
) -> tuple[np.ndarray, np.ndarray]:
    """The reward and the success at each step, (episodes, episode_steps) both.

    Episodes start from seeds seed, seed + 1, ..., and are episode_steps long: only truncation ends them. Several
    processes share the episodes and each gets all results.
    """
    rank, world = processes()
    rewards, successes = [], []
    for first in range(0, episodes, world * envs.num_envs):
        _, _, reward, _, _, success = rollout(envs, act, episode_steps, reward_fn, seed + first + rank * envs.num_envs)
        rewards.extend(gather(reward.T))
        successes.extend(gather(success.T))
    return np.array(rewards[:episodes]), np.array(successes[:episodes])


# ----------------------------------------------------------------------------------------------------------------------
# Algorithm 1: the training loop


def train(
    agent: SAC, envs: VectorEnv, eval_envs: VectorEnv, reward_fn: Callable | None, folder: Path | None = None
) -> Iterator[dict]:
    """Algorithm 1. Yields a dict after each round; at the end the agent is its best checkpoint.

    In the dict are numbers (the losses are those of the round's last batch), success at each step of each episode,
    (episodes, round_steps), under "success" and "eval_success", and "best": True where the checkpoint is the best yet.

    envs, eval_envs: vector environments made with autoreset_mode=DISABLED, for episodes of config.round_steps;
    eval_envs serve only the deterministic evaluations that choose the checkpoint, by reward alone. reward_fn: uint8
    frames (B, H, W, 3) -> rewards (B,). folder: all that it takes to go on is written there after each round, once
    the round's row has been dealt with; if an interrupted run is there already, this goes on where that stopped.
    Raises ValueError if that was of another config, and for rewards that are NaN or infinite.

    If torch.distributed has been initialised, every process runs this, with environments, a buffer and a share of each
    batch of its own; gradients are averaged, so that all agents stay the same.
    """
    config, (rank, world) = agent.config, processes()
    (obs_size,), (act_size,) = envs.single_observation_space.shape, envs.single_action_space.shape
    round_size = config.round_steps * envs.num_envs * world  # steps in all environments of all processes
    if any(env.metadata.get("autoreset_mode") == AutoresetMode.SAME_STEP for env in (envs, eval_envs)):
        raise ValueError("the environments reset in the step that ends an episode: make them with DISABLED")
    if config.batch_size % world:
        raise ValueError(f"batch_size is {config.batch_size}; it has to be a multiple of the {world} processes")
    if config.buffer_size < round_size:
        raise ValueError(f"buffer_size is {config.buffer_size}; it has to hold a round, here of {round_size} steps")
    buffer = ReplayBuffer(min(config.buffer_size, config.steps + round_size) // world, obs_size, act_size)
    steps, best_reward, best, next_eval = 0, -math.inf, None, config.learning_starts
    settings = vars(config) | dict(processes=world, round_size=round_size)
    # the last so many steps of a run, a whole number of rounds, fill every process' buffer again
    remembered = math.ceil(buffer.size * world / round_size) * round_size
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
    if folder is not None and (folder / "state.pt").exists():
        saved = restore(agent, buffer, folder, settings, remembered)
        steps, best_reward, best, next_eval = (saved[key] for key in ("steps", "best_reward", "best", "next_eval"))
    if (gather(np.array([steps])) != steps).any():
        raise ValueError(f"{folder} differs between the processes: those on several machines have to share it")

    for start in range(steps, config.steps, round_size):
        steps = start + round_size
        rng = np.random.default_rng([config.seed, start, rank])  # of this round alone, so that a run can be resumed
        torch.manual_seed(int(rng.integers(2**63)))
        # act; label the frames of the whole round; move it to D
        shape = (config.round_steps, *envs.action_space.shape)
        noise = pink_noise(rng, shape) if start < config.pink * config.steps else rng.standard_normal(shape)
        noise = iter(torch.as_tensor(noise, dtype=torch.float32, device=agent.device))
        first_seed = 10**10 * (config.seed + 1) + start + rank * envs.num_envs  # of the environments' episodes
        *columns, success = rollout(
            envs, lambda obs: agent.act(obs, next(noise)), config.round_steps, reward_fn, first_seed
        )
        rows = np.concatenate([x.reshape(round_size // world, -1) for x in columns], 1, dtype=np.float32)
        buffer.add(torch.from_numpy(rows))
        agent.norm.update(torch.as_tensor(gather(rows[:, :obs_size]), device=agent.device))
        row = dict(steps=steps, reward=float(gather(columns[2]).mean()), success=gather(success.T))
        # learn
        if steps >= config.learning_starts:
            for optimizer in agent.optimizers:  # smaller and smaller steps, so that the policy comes to rest; never 0
                optimizer.param_groups[0]["lr"] = config.learning_rate * (1 - start / config.steps)
            precision = torch.get_float32_matmul_precision()
            torch.set_float32_matmul_precision("medium")  # bf16 or tf32 matmuls where the hardware has them
            try:
                for _ in range(max(1, round(round_size * config.updates_per_step))):
                    losses = agent.update(*buffer.sample(config.batch_size // world, agent.device))
            finally:
                torch.set_float32_matmul_precision(precision)
            row |= {key: float(gather(np.array([value.item()])).mean()) for key, value in losses.items()}
            if not all(math.isfinite(row[key]) for key in losses):
                raise ValueError(f"learning diverged within {steps} steps: losses are NaN. Lower the learning_rate")
        # judge, and keep the best
        if steps >= next_eval or steps >= config.steps:
            next_eval = steps + max(config.eval_every, config.steps // 32)  # a long run is not to spend its time here
            rewards, successes = evaluate(
                eval_envs, agent.best_action, reward_fn, config.eval_episodes, 10**9 + config.seed, config.round_steps
            )
            row |= dict(eval_reward=float(rewards.mean()), eval_success=successes)
            if row["eval_reward"] > best_reward:
                best_reward, best, row["best"] = row["eval_reward"], copy.deepcopy(agent.state_dict()), True
        if folder is not None:
            with atomic_open(round_file(folder, start)) as file:
                np.save(file, rows)
        yield row  # what the caller writes is on the disk before the state that goes with it
        if folder is None:
            continue
        if world > 1:
            dist.barrier()  # so are the rounds of all processes
        if rank == 0:
            with atomic_open(folder / "state.pt") as file:
                state = dict(settings=settings, steps=steps, next_eval=next_eval, best=best, best_reward=best_reward)
                optimizers = [optimizer.state_dict() for optimizer in agent.optimizers]
                torch.save(state | dict(agent=agent.state_dict(), optimizers=optimizers), file)
        # one more round is kept than the buffer remembers: other processes may still need it for the state before
        round_file(folder, start - remembered - round_size).unlink(missing_ok=True)
    agent.load_state_dict(best)


# ----------------------------------------------------------------------------------------------------------------------
# Interrupted runs: what train(folder=...) leaves on the disk


@contextlib.contextmanager
def atomic_open(path: Path, mode: str = "wb") -> Iterator[io.BytesIO | io.StringIO]:
    """A file to write, which takes its name only when it is complete and on the disk: there is never half a file.

    It is gathered in memory first: on a full disk, torch.save itself raises something else than OSError.
    """
    buffer = io.BytesIO() if "b" in mode else io.StringIO(newline="")
    yield buffer
    with open(f"{path}.part", "wb") as file:
        file.write(buffer.getvalue() if "b" in mode else buffer.getvalue().encode())
        file.flush()
        os.fsync(file.fileno())
    os.replace(f"{path}.part", path)


def round_file(folder: Path, start: int) -> Path:
    """Where this process keeps the transitions of the round that began after `start` steps."""
    return folder / f"round{start}-{processes()[0]}.npy"


def restore(agent: SAC, buffer: ReplayBuffer, folder: Path, settings: dict, remembered: int) -> dict:
    """Puts agent and buffer where an interrupted run left them, and returns what else that run's state.pt holds."""
    path = folder / "state.pt"
    try:
        saved = dict(torch.load(path, map_location=agent.device, weights_only=True))
    except Exception as error:  # whatever unpickling meets
        raise ValueError(f"{path} is damaged ({str(error)[:99]})") from error
    differ = [key for key, value in saved["settings"].items() if value != settings.get(key)]
    if differ:
        others = "; ".join(f"{key} {saved['settings'][key]} there, {settings.get(key)} here" for key in differ)
        raise ValueError(f"{folder} is of other settings: {others}")
    agent.load_state_dict(saved["agent"])
    for optimizer, state in zip(agent.optimizers, saved["optimizers"]):
        optimizer.load_state_dict(state)
    oldest = max(0, saved["steps"] - remembered)
    buffer.next = oldest // settings["processes"] % buffer.size  # where that round's rows lay
    for start in range(oldest, saved["steps"], settings["round_size"]):
        path = round_file(folder, start)
        try:
            buffer.add(torch.from_numpy(np.load(path).reshape(-1, sum(buffer.widths))))
        except (ValueError, EOFError) as error:
            raise ValueError(f"{path} is damaged ({error})") from error
    return saved
