"""To be skipped at a first reading. Several processes that share one training, by torchrun.

To sac.py there is one training with all environments. Each process runs it, with the same agent and
the same random numbers, but plays, draws and labels its share of the environments alone, and
learns from its share of each batch. What the others do, it is told.
"""

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import sac
import torch
import torch.distributed as dist
from gymnasium.vector import VectorEnv, VectorWrapper
from gymnasium.vector.utils import batch_space
from torch import Tensor
from torch.nn.utils import parameters_to_vector, vector_to_parameters


def join(device: str) -> tuple[str, int, int]:
    """Under torchrun, meets the other processes. Returns this one's device and number, and of how
    many. On a machine with several GPUs, each has its own.
    """
    local = int(os.environ.get("LOCAL_RANK", 0))  # torchrun sets these: the number on its machine,
    here = int(os.environ.get("LOCAL_WORLD_SIZE", 1))  # how many are there,
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:  # and how many on all machines
        return device, 0, 1
    gpus = torch.cuda.device_count()
    if device.startswith("cuda") and gpus:
        device = f"cuda:{local % gpus}"
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device != "cpu" and here <= gpus else "gloo")
    return device, dist.get_rank(), dist.get_world_size()


def check_same_start(steps: int, folder: Path):
    """Raises ValueError unless all processes found the same checkpoint."""
    if dist.is_initialized() and (gather(np.array([steps])) != steps).any():
        raise ValueError(f"{folder}: all machines of a training have to share it")


def share(agent: sac.SAC, envs: VectorEnv, reward_fn: Callable) -> tuple:
    """Makes one training of the processes'. Returns what takes the place of the last two.

    envs: this process' share of the environments, the same number in each.
    """
    if not dist.is_initialized():
        return envs, reward_fn
    agent.update = shared_update(agent)
    envs = SharedEnvs(envs)
    return envs, reward_fn and shared_reward(reward_fn, envs)


class SharedEnvs(VectorWrapper):
    """All processes' environments as one vector environment, of which this process plays a part."""

    def __init__(self, env: VectorEnv):
        super().__init__(env)
        first = dist.get_rank() * env.num_envs
        self.mine = slice(first, first + env.num_envs)
        self.action_space = batch_space(env.single_action_space, self.num_envs)
        self.observation_space = batch_space(env.single_observation_space, self.num_envs)

    @property
    def num_envs(self) -> int:
        return self.env.num_envs * dist.get_world_size()

    def reset(self, *, seed: int | None = None, options: dict | None = None) -> tuple:
        seed = None if seed is None else seed + self.mine.start
        if options is not None:
            options = {"reset_mask": options["reset_mask"][self.mine]}
        if options is None or options["reset_mask"].any():
            self.obs, _ = self.env.reset(seed=seed, options=options)
        return gather(self.obs), {}

    def step(self, actions: np.ndarray) -> tuple:
        self.obs, *results, info = self.env.step(actions[self.mine])
        success = info.get("success", np.full(self.env.num_envs, np.nan))
        obs, reward, terminated, truncated, success = gather(self.obs, *results, success)
        return obs, reward, terminated, truncated, {"success": success}

    def render(self) -> list[np.ndarray]:
        """The frames of this process' environments, and the first of them in the others' places."""
        frames = self.env.render()
        everything = [frames[0]] * self.num_envs
        everything[self.mine] = frames
        return everything


def shared_reward(reward_fn: Callable, envs: SharedEnvs) -> Callable:
    """frames (T * N, H, W, 3) of SharedEnvs -> rewards (T * N,), each labelled by its process."""

    def reward(frames: np.ndarray) -> np.ndarray:
        rounds = frames.reshape(-1, envs.num_envs, *frames.shape[1:])[:, envs.mine]
        rewards = np.asarray(reward_fn(rounds.reshape(-1, *frames.shape[1:])), float)
        rewards = rewards.reshape(len(rounds), -1)  # (T, environments of this process)
        return gather(rewards.T).T.reshape(-1)

    return reward


def gather(*arrays: np.ndarray) -> np.ndarray | list[np.ndarray]:
    """Each array with those of all processes behind each other, along the first axis."""
    parts = [None] * dist.get_world_size()
    dist.all_gather_object(parts, arrays)
    together = [np.concatenate(part) for part in zip(*parts)]
    return together if len(together) > 1 else together[0]


def shared_update(agent: sac.SAC) -> Callable:
    """agent.update, of a batch of which each process takes its share; gradients are averaged."""
    update, rank, world = agent.update, dist.get_rank(), dist.get_world_size()

    def average(optimizer, *_):  # before each step of an optimizer
        gradients = [parameter.grad for parameter in optimizer.param_groups[0]["params"]]
        vector_to_parameters(mean(parameters_to_vector(gradients)), gradients)

    def mean(x: Tensor) -> Tensor:
        dist.all_reduce(x)
        return x / world

    def shared(*batch: Tensor) -> dict[str, Tensor]:
        mine = [column.tensor_split(world)[rank] for column in batch]
        seed = int(torch.randint(2**62, ()))  # the same in all processes
        gpus = [agent.device] if str(agent.device) != "cpu" else []
        with torch.random.fork_rng(gpus):  # so that all go on alike after the update
            torch.manual_seed(seed + rank)
            losses = update(*mine)
        together = mean(torch.stack([loss.detach() for loss in losses.values()]))
        return dict(zip(losses, together))

    for optimizer in agent.optimizers:
        optimizer.register_step_pre_hook(average)
    return shared
