"""Makes a CLIP like the embedded one, into runs/clip, in under two hours on 2 cores:

    python tinyclip/make.py

What it is, plainly: a small CLIP that knows one thing, how humanoid bodies are posed. Like the
paper's, it never saw the robot that it judges: it learns from pictures of other bodies in other
scenes. Unlike the paper's, it knows nothing else.

    1. bodies     at random: other limbs, shapes and colours, in other scenes, seen by other cameras
                  (bodies.py)
    2. states     each body is posed, settles under its own gravity, and is moved by random motors
                  (poses.py). No policy plays in any of them
    3. captions   computed from each state by geometry, in the body's own measure, so that any
                  frame, however odd, has a true sentence (captions.py)
    4. grades     how nearly each other sentence is true as well (grading.py)
    5. training   contrastive, like CLIP's; but in a batch, every sentence that is true of a frame
                  is a positive. And the cosine of a frame and a sentence is pulled towards how
                  nearly it is true. Meanwhile the image tower also learns to name the labels and to
                  tell where each limb is (Aids)

Six combinations, such as kneeling with raised arms, are kept from all of it (HELD_OUT): sentences
to try it on. No success condition and no hand-written reward is used here, but the captions' rules
mirror the conditions. The same command on the same machine, with as many threads, makes the same
weights; the committed ones were made on one core, with OMP_NUM_THREADS=1 before the command.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
import vlmrm  # before mujoco: it chooses how to draw
import open_clip
import torch
import torch.nn as nn
import torch.nn.functional as F
import mujoco
import numpy as np
from safetensors.torch import save_file
from tinyclip import bodies, grading, poses
from tinyclip.captions import ARMS, LEGS, SUBJECTS, TABLES, TRUNK
from tinyclip.captions import arms_of, held_out, label, truth, write_captions
from tinyclip.poses import in_parallel
from torch import Tensor

# --------------------------------------------------------------------------------------------------
# The data


def arm_library(seed: int, count: int = 24, tries: int = 2500) -> np.ndarray:
    """Angles of both arms in radians, (n, 6), found by trying random ones on `count` bodies."""
    found = []
    for i in range(count):
        rng = bodies.body_rng(seed, i)
        model = bodies.build(bodies.random_body(rng), rng, 32)
        tried = poses.random_arms(poses.Simulator(model), rng, tries)
        found.append(choose_arms(model, tried, 10, rng))
    return np.concatenate(found)


def choose_arms(
    model: mujoco.MjModel, angles: np.ndarray, each: int, rng: np.random.Generator
) -> np.ndarray:
    """Of angles (n, 6) of a body's arms, `each` of every label that is among them, (m, 6).

    Of those that the prompts name, three times as many.
    """
    sim = poses.Simulator(model)
    states = np.tile(model.qpos0, (len(angles), 1))
    states[:, sim.arms] = angles
    labels, chosen = arms_of(bodies.measure(model, states)), []
    for name in [*ARMS, "raised", "raised", "crossed", "crossed", "hips", "hips"]:
        rows = np.flatnonzero(labels == ARMS.index(name))
        if len(rows):
            chosen.append(angles[rng.choice(rows, each)])
    return np.concatenate(chosen)


def make_data(
    count: int, frames: int, size: int, seed: int, log: Callable = print
) -> tuple[np.ndarray, vlmrm.Pose]:
    """`count` bodies in `frames` states each: frames, uint8 (N, size, size, 3), and their poses."""
    arms = arm_library(seed, min(24, count))
    log(f"{len(arms)} poses of arms")
    jobs, parts = [(i, arms, frames, size, seed) for i in range(count)], []
    for part in in_parallel(frames_of_body, jobs, min(2, torch.get_num_threads())):
        parts.append(part)
        if len(parts) % 20 == 0:
            log(f"{len(parts)} of {count} bodies")
    pose = vlmrm.Pose(*(np.concatenate(x) for x in zip(*(pose for _, pose in parts))))
    return np.concatenate([drawn for drawn, _ in parts]), pose


def frames_of_body(
    number: int, arms: np.ndarray, count: int, size: int, seed: int
) -> tuple[np.ndarray, vlmrm.Pose]:
    """Body `number` in `count` of its states, those with rare labels more often than others.

    Returns frames, uint8 (N, size, size, 3), and their poses in the body's own measure. N is less
    than count where too many states are held out.
    """
    rng = bodies.body_rng(seed, number)
    body = bodies.random_body(rng)
    model = bodies.build(body, rng, size)
    arms = choose_arms(model, arms[rng.integers(len(arms), size=1500)], 40, rng)
    states = poses.random_states(poses.Simulator(model), arms, rng, 2 * count)
    pose = bodies.measure(model, states)
    chance = chances(label(pose)) ** 2 * ~held_out(pose)
    count = min(count, np.count_nonzero(chance))
    rows = rng.choice(len(states), count, replace=False, p=chance / chance.sum())
    return bodies.draw(body, model, states[rows], rng), vlmrm.Pose(*(x[rows] for x in pose))


# --------------------------------------------------------------------------------------------------
# The model and its training

VOCABULARY = 49408  # of CLIP's tokenizer
PREPROCESS = dict(mean=[0.5] * 3, std=[0.25] * 3, interpolation="bicubic", resize_mode="shortest")


def architecture(width: int = 16, size: int = 96) -> dict:
    """A miniature of CLIP's own RN50, for frames of size x size pixels, as open_clip has it.

    One block a stage instead of 3, 4, 6, 3, and a quarter of the width.
    """
    layers = [1, 1, 1, 1]
    return dict(
        embed_dim=64,
        vision_cfg=dict(layers=layers, width=width, head_width=width * 4, image_size=size),
        text_cfg=dict(context_length=32, vocab_size=VOCABULARY, width=32, heads=2, layers=2),
    )


class Aids(nn.Module):
    """What only training has, to learn sooner where the limbs are: it is dropped at saving."""

    def __init__(self, visual: nn.Module, targets: int):
        super().__init__()
        # of the embedding: which label of each kind is it?
        self.heads = nn.ModuleList(nn.Linear(64, len(names)) for names in (LEGS, ARMS, TRUNK))
        # of the last feature map, which the embedding is made of: where is each limb?
        side = visual.image_size // 32
        channels = visual.layer4[-1].conv3.out_channels
        self.places = nn.Linear(channels * side * side, targets)
        # from a cosine to a truth in [0, 1]
        self.line = nn.Parameter(torch.tensor([1.6, 0.0]))
        visual.layer4.register_forward_hook(lambda *args: setattr(self, "map", args[-1]))


def train(
    frames: np.ndarray,
    pose: vlmrm.Pose,
    config: dict,
    steps: int,
    seed: int = 0,
    batch_size: int = 128,
    folder: Path | None = None,
) -> open_clip.CLIP:
    """A new model of frames, uint8 (N, H, W, 3), and their poses; saved meanwhile in `folder`."""
    torch.manual_seed(seed)
    rng, labels = np.random.default_rng(seed), label(pose)
    grades = grading.grade_phrases(pose, labels)
    places = np.concatenate([grading.leg_vectors(pose), grading.arm_vectors(pose)], 1)
    places = (places - places.mean(0)) / places.std(0)
    model = open_clip.CLIP(**config).requires_grad_().to(memory_format=torch.channels_last)
    tokenizer = open_clip.SimpleTokenizer(context_length=config["text_cfg"]["context_length"])
    mask, aids = used_tokens(tokenizer), Aids(model.visual, places.shape[1])
    silence(model, mask)
    parameters = [*model.parameters(), *aids.parameters()]
    optimizer = torch.optim.AdamW(parameters, 2e-3, weight_decay=0.02, fused=True)
    # the learning rate rises in the first tenth, then falls to 0 along half a cosine
    rate = [min(10 * t, 1) * (1 + np.cos(np.pi * t)) / 2 for t in np.linspace(0, 1, steps + 1)]
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda i: rate[min(i + 1, steps)])
    mean, std = (torch.tensor(PREPROCESS[key]).view(3, 1, 1) for key in ("mean", "std"))
    model.train()
    # bf16 is 1.5 times as fast where a CPU has it; elsewhere a tenth as fast
    bf16 = torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    start, report, chance = time.time(), np.zeros(6), chances(labels)
    for i in range(steps):
        rows = rng.choice(len(frames), batch_size, p=chance)
        x = torch.from_numpy(frames[rows]).permute(0, 3, 1, 2).float() / 255
        x = (x * (1 + 0.1 * torch.randn(len(x), 1, 1, 1)) - mean) / std  # darker or brighter
        sentences, says = write_captions(np.tile(labels[rows], (2, 1)), rng)  # two of each frame
        true = torch.from_numpy(truth(labels[rows], says)).float()  # (B frames, 2B sentences)
        graded = torch.from_numpy(grading.graded_truth(grades, rows, says))
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            image = model.encode_image(x.contiguous(memory_format=torch.channels_last))
        image = F.normalize(image.float(), dim=-1)
        text = F.normalize(model.encode_text(tokenizer(sentences)), dim=-1)
        cosine = image @ text.T  # (B, 2B)
        contrastive = contrastive_loss(model.logit_scale.exp().clamp(max=30) * cosine, true)
        # a cosine has to say how true, and no more. A new model learns less if this has its full
        # weight from the start
        squared = (aids.line[0] * cosine + aids.line[1] - graded).square().mean()
        weight = 30 * min(1, 2 * i / steps)
        y = torch.from_numpy(labels[rows])
        kinds = [F.cross_entropy(head(image) * 10, y[:, k]) for k, head in enumerate(aids.heads)]
        found = aids.places(aids.map.float().flatten(1))
        off = (found - torch.from_numpy(places[rows])).square().mean()
        loss = contrastive + weight * squared + 0.5 * sum(kinds) + off
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        silence(model, mask)
        report += [contrastive.item(), squared.item(), *(k.item() for k in kinds), off.item()]
        if (i + 1) % 50 == 0:
            names = "contrastive", "squared", "legs", "arms", "trunk", "places"
            losses = " ".join(f"{name} {value / 50:.3f}" for name, value in zip(names, report))
            print(f"  step {i + 1}/{steps} {losses} {time.time() - start:.0f} s", flush=True)
            report[:] = 0
        if folder and (i + 1) % 300 == 0:
            save(model, config, folder)
    return model.eval()


def used_tokens(tokenizer: open_clip.SimpleTokenizer) -> Tensor:
    """1 for each token that a caption may use, 0 for the others: (VOCABULARY, 1)."""
    phrases = [phrase for sentences, _ in TABLES for phrase in sentences]
    captions = [f"{subject} {phrase}" for subject in SUBJECTS for phrase in phrases]
    used = tokenizer([*captions, ", "]).unique()
    return torch.zeros(VOCABULARY, 1).index_fill_(0, used, 1)


@torch.no_grad()
def silence(model: open_clip.CLIP, mask: Tensor):
    """Makes the tokens that no caption uses say nothing."""
    model.token_embedding.weight.mul_(mask)


def chances(labels: np.ndarray) -> np.ndarray:
    """How probable each frame of labels (N, 3) is in a batch, (N,): rare legs and arms are more."""
    legs, arms = (np.bincount(labels[:, k])[labels[:, k]] for k in (0, 1))
    chance = 1 / np.sqrt(legs) * (1 / np.sqrt(arms))
    return chance / chance.sum()


def contrastive_loss(logits: Tensor, true: Tensor) -> Tensor:
    """CLIP's loss with several positives: the mean cross-entropy of both directions.

    logits (B frames, C sentences); true: 1 where the sentence is true of the frame, else 0.
    """
    of_frames = (true / true.sum(1, keepdim=True)) * logits.log_softmax(1)
    of_sentences = (true / true.sum(0)) * logits.log_softmax(0)
    return -of_frames.sum(1).mean() / 2 - of_sentences.sum(0).mean() / 2


def save(model: open_clip.CLIP, config: dict, folder: Path):
    """Leaves the model in a folder, as open_clip's local-dir: wants it, with weights in fp16."""
    folder.mkdir(exist_ok=True, parents=True)
    settings = dict(model_cfg=config, preprocess_cfg=PREPROCESS)
    (folder / "open_clip_config.json").write_text(json.dumps(settings, indent=1) + "\n")
    weights = {}
    for name, value in model.state_dict().items():
        half = value.is_floating_point() and "running" not in name  # statistics stay in fp32
        weights[name] = (value.half() if half else value).contiguous()
    save_file(weights, folder / "open_clip_model.safetensors")


# --------------------------------------------------------------------------------------------------
# The command line


def make(args: argparse.Namespace):
    """Bodies, states, frames and training, as at the top of this file."""
    start = time.time()

    def log(text):
        print(f"[{(time.time() - start) / 60:.1f} min] {text}", flush=True)

    frames, pose = make_data(args.bodies, args.frames, args.size, args.seed, log)
    log(f"{len(frames)} frames")
    labels = label(pose)
    for k, names in enumerate((LEGS, ARMS, TRUNK)):
        counts = np.bincount(labels[:, k], minlength=len(names))
        print("  " + ", ".join(f"{name} {count}" for name, count in zip(names, counts)))
    config = architecture(args.width, args.size)
    model = train(frames, pose, config, args.steps, args.seed, folder=args.out)
    save(model, config, args.out)
    log(f"a model in {args.out}")


def main():
    parser = argparse.ArgumentParser(
        description="Makes a CLIP like the embedded one.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--bodies", type=int, default=500, help="bodies to learn from")
    add("--frames", type=int, default=130, help="frames of each")
    add("--steps", type=int, default=4000, help="training steps")
    add("--width", type=int, default=16, help="of the image tower")
    add("--size", type=int, default=96, help="of the frames, in pixels")
    add("--seed", type=int, default=0, help="of all that is random")
    add("--out", type=Path, default=Path("runs/clip"), help="where the model goes")
    make(parser.parse_args())


if __name__ == "__main__":
    main()
