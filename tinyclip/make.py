"""Makes a CLIP like the embedded one, into runs/clip, in about two hours on 2 cores:

    OMP_NUM_THREADS=1 python tinyclip/make.py

What it is, plainly: a small CLIP that knows one thing, how humanoid bodies are posed. It never saw
the robot that it judges: it learns from pictures of other bodies in other scenes. Unlike the
paper's CLIPs, it knows nothing else.

    1. bodies     at random: other limbs, shapes and colours, in other scenes, seen by other cameras
                  (bodies.py)
    2. states     bodies in random poses, falling or settling from such, or moved by random motors
                  (poses.py). No policy plays in any of them
    3. captions   computed from each state by geometry, in the body's own measure, so that any
                  frame, however odd, has a true sentence (captions.py)
    4. grades     how nearly each other sentence is true as well (grading.py)
    5. training   contrastive, like CLIP's; but in a batch, every sentence that is true of a frame
                  is a positive. And the cosine of a frame and a sentence is pulled towards how
                  nearly it is true. Meanwhile the image tower also learns to name the labels and to
                  tell where each limb is (Aids)

All of this is done twice. The first lesson has bodies and cameras of all kinds. Then climbers look
for poses of some of them that the model likes, as a policy would, but without one (climbs_of_body).
The second lesson has these, with their true captions, and new bodies whose torsos and cameras
differ less from the usual ones: how far a torso leans back can hardly be seen from the front where
its length and the camera's height may be anything.

Six combinations, such as kneeling with raised arms, are kept from all of it (HELD_OUT): sentences
to try it on. No success condition and no hand-written reward is used here, but the captions' rules
mirror the conditions, and climbers climb for the tasks' prompts. The same command on the same kind
of machine, with as many threads, makes the same weights.
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


def arm_library(seed: int, count: int = 24, tries: int = 2500, near: bool = False) -> np.ndarray:
    """Angles of both arms in radians, (n, 6), found by trying random ones on `count` bodies."""
    found = []
    for i in range(count):
        rng = bodies.body_rng(seed, i)
        model = bodies.build(bodies.random_body(rng, near), rng, 32)
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
    count: int,
    frames: int,
    size: int,
    seed: int,
    log: Callable = print,
    near: bool = False,
    climb: Path | None = None,
) -> tuple[np.ndarray, vlmrm.Pose]:
    """`count` bodies in `frames` states each: frames, uint8 (N, size, size, 3), and their poses.

    near: the new bodies and cameras of the second lesson. Or climb: the folder of a CLIP; the
    states are those that it likes.
    """
    assert not (near and climb)
    arms, parts = arm_library(seed, min(24, count), near=near), []
    log(f"{len(arms)} poses of arms")
    function, more = (climbs_of_body, (climb,)) if climb else (frames_of_body, (near,))
    jobs = [(i, arms, frames, size, seed, *more) for i in range(count)]
    for part in in_parallel(function, jobs):
        parts.append(part)
        if len(parts) % 20 == 0:
            log(f"{len(parts)} of {count} bodies")
    pose = vlmrm.Pose(*(np.concatenate(x) for x in zip(*(pose for _, pose in parts))))
    return np.concatenate([drawn for drawn, _ in parts]), pose


def frames_of_body(
    number: int, arms: np.ndarray, count: int, size: int, seed: int, near: bool = False
) -> tuple[np.ndarray, vlmrm.Pose]:
    """Body `number` in `count` of its states, those with rare labels more often than others.

    Returns frames, uint8 (N, size, size, 3), and their poses in the body's own measure. N is less
    than count where too many states are held out.
    """
    rng = bodies.body_rng(seed, number)
    body = bodies.random_body(rng, near)
    model = bodies.build(body, rng, size)
    arms = choose_arms(model, arms[rng.integers(len(arms), size=1500)], 40, rng)
    states = poses.random_states(poses.Simulator(model), arms, rng, 2 * count)
    pose = bodies.measure(model, states)
    # squared: 1 / (how often its legs are there) / (how often its arms are)
    chance = chances(label(pose)) ** 2 * ~held_out(pose)
    count = min(count, np.count_nonzero(chance))
    rows = rng.choice(len(states), count, replace=False, p=chance / chance.sum())
    painter = bodies.Painter(body, model)
    frames = painter.draw(states[rows], rng)
    painter.close()
    return frames, vlmrm.Pose(*(x[rows] for x in pose))


def climbs_of_body(
    number: int,
    arms: np.ndarray,
    count: int,
    size: int,
    seed: int,
    folder: Path,
    each: int = 4,
    tries: int = 40,
) -> tuple[np.ndarray, vlmrm.Pose]:
    """Body `number` in up to `count` states that a CLIP likes, found without a policy.

    For each of the eight tasks' prompts and of four captions, the best `each` of 300 random states
    are changed at random, and a change stays if it earns more. Kept are the states after a quarter,
    a half, three quarters and all of the `tries`. Some may be such as would mislead a policy; their
    captions are true. Returns as frames_of_body.
    """
    torch.set_num_threads(1)
    rng = bodies.body_rng(seed, number)
    body = bodies.random_body(rng)
    model = bodies.build(body, rng, size)
    rng = np.random.default_rng([seed, number, 1])  # other states than those of frames_of_body
    sim, camera = poses.Simulator(model), bodies.usual_camera(body)
    arms = choose_arms(model, arms[rng.integers(len(arms), size=1500)], 40, rng)
    clip = vlmrm.CLIP(f"local-dir:{folder}", "cpu")
    baseline, painter = clip.embed_text(vlmrm.BASELINE_PROMPT), bodies.Painter(body, model)

    def like(states, goals):  # (N, 24) -> (N, len(goals)); states held out earn -1
        image = clip.embed_images(painter.draw(states, rng, camera))
        earned = [vlmrm.goal_baseline_reward(image, goal, baseline, 0.5) for goal in goals]
        allowed = ~held_out(bodies.measure(model, states))
        return np.where(allowed[:, None], torch.stack(earned, 1).numpy(), -1)

    states = poses.random_states(sim, arms, rng, 300)
    pose = bodies.measure(model, states)
    labels = label(pose)[~held_out(pose)]
    some, says = write_captions(labels[rng.choice(len(labels), 20)], rng)
    prompts = [prompt for prompt, _ in vlmrm.TASKS.values()]
    prompts += [sentence for sentence, row in zip(some, says) if row[:2].any()][:4]
    goals = [clip.embed_text(prompt) for prompt in prompts]
    rewards = like(states, goals)
    best = np.argsort(-rewards, 0)[:each]  # (each, len(goals))
    mine = np.tile(np.arange(len(goals)), each)
    states, rewards, kept = states[best.flatten()], rewards[best.flatten(), mine], []
    for i in range(1, tries + 1):
        others = np.array([poses.changed(sim, arms, qpos, rng) for qpos in states])
        for k in np.flatnonzero(rng.random(len(others)) < 0.25):
            others[k] = sim.settle(others[k], rng.choice([20, 60, 150, 300]), [30])[-1]
        earned = like(others, goals)[np.arange(len(others)), mine]
        better = earned > rewards
        states[better], rewards[better] = others[better], earned[better]
        if i % (tries // 4) == 0:
            kept.append(states.copy())
    states = np.concatenate(kept)
    states = states[~held_out(bodies.measure(model, states))]
    states = states[rng.permutation(len(states))[:count]]
    frames = painter.draw(states, rng)
    painter.close()
    return frames, bodies.measure(model, states)


# --------------------------------------------------------------------------------------------------
# The model and its training

FOUND = 0.4  # of a batch of the second lesson, the share of states that climbers found
CLIMBED = 192  # such states of each body: of 12 sentences, 4 climbers, 4 times on their way
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
    """What only training has, to learn sooner where the limbs are; no part of the model."""

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
    start: open_clip.CLIP | None = None,
    found: int = 0,
) -> open_clip.CLIP:
    """A model of frames, uint8 (N, H, W, 3), and their poses; saved meanwhile in `folder`.

    It is new, or goes on from `start`. Of the frames, the last `found` are those that climbers
    found.
    """
    torch.manual_seed(seed)
    rng, labels = np.random.default_rng(seed), label(pose)
    grades = grading.grade_phrases(pose, labels)
    places = np.concatenate([grading.leg_vectors(pose), grading.arm_vectors(pose)], 1)
    places = (places - places.mean(0)) / places.std(0)
    model = start or open_clip.CLIP(**config)
    model = model.requires_grad_().to(memory_format=torch.channels_last)
    tokenizer = open_clip.SimpleTokenizer(context_length=config["text_cfg"]["context_length"])
    mask, aids = used_tokens(tokenizer), Aids(model.visual, places.shape[1])
    silence(model, mask)
    parameters = [*model.parameters(), *aids.parameters()]
    peak = 1e-3 if start else 2e-3
    optimizer = torch.optim.AdamW(parameters, peak, weight_decay=0.02, fused=True)
    # the learning rate falls to 0 along half a cosine; in the first tenth it also rises from 0
    rate = [min(10 * t, 1) * (1 + np.cos(np.pi * t)) / 2 for t in np.linspace(0, 1, steps + 1)]
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda i: rate[min(i + 1, steps)])
    mean, std = (torch.tensor(PREPROCESS[key]).view(3, 1, 1) for key in ("mean", "std"))
    model.train()
    # bf16 is 1.5 times as fast where a CPU has it; elsewhere a tenth as fast
    bf16 = torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    begun, report = time.time(), np.zeros(6)
    chance = chances(labels)
    if found:
        posed, climbed = chances(labels[:-found]), chances(labels[-found:])
        chance = np.concatenate([posed * (1 - FOUND), climbed * FOUND])
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
        weight = 30 * (1 if start else min(1, 2 * i / steps))
        y = torch.from_numpy(labels[rows])
        kinds = [F.cross_entropy(head(image) * 10, y[:, k]) for k, head in enumerate(aids.heads)]
        guessed = aids.places(aids.map.float().flatten(1))
        off = (guessed - torch.from_numpy(places[rows])).square().mean()
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
            print(f"  step {i + 1}/{steps} {losses} {time.time() - begun:.0f} s", flush=True)
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
    """How probable each frame of labels (N, 3) is in a batch, (N,): rare ones are more so."""
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
    """Both lessons, as at the top of this file."""
    begun, first = time.time(), args.out / "first"

    def log(text):
        print(f"[{(time.time() - begun) / 60:.1f} min] {text}", flush=True)

    config = architecture(args.width, args.size)
    frames, pose = make_data(args.bodies, args.frames, args.size, args.seed, log)
    log(f"{len(frames)} frames")
    labels = label(pose)
    for k, names in enumerate((LEGS, ARMS, TRUNK)):
        counts = np.bincount(labels[:, k], minlength=len(names))
        print("  " + ", ".join(f"{name} {count}" for name, count in zip(names, counts)))
    model = train(frames, pose, config, args.steps, args.seed, folder=first)
    save(model, config, first)
    log(f"the model of the first lesson in {first}; now, what does it like?")
    del frames
    found = make_data(args.climbs, CLIMBED, args.size, args.seed, log, climb=first)
    log(f"{len(found[0])} frames found; now bodies and cameras nearer to the usual ones")
    near = make_data(args.bodies, args.frames, args.size, args.seed + 1, log, near=True)
    frames = np.concatenate([near[0], found[0]])
    pose = vlmrm.Pose(*(np.concatenate(pair) for pair in zip(near[1], found[1])))
    model = open_clip.create_model(f"local-dir:{first}")
    steps, seed = args.more_steps, args.seed + 1
    model = train(frames, pose, config, steps, seed, start=model, found=len(found[0]))
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
    add("--steps", type=int, default=4000, help="training steps of the first lesson")
    add("--climbs", type=int, default=100, help="of those bodies, how many climb then, at least 1")
    add("--more-steps", type=int, default=1400, help="training steps of the second lesson")
    add("--width", type=int, default=16, help="of the image tower")
    add("--size", type=int, default=96, help="of the frames, in pixels")
    add("--seed", type=int, default=0, help="of the first lesson; the second has the next one")
    add("--out", type=Path, default=Path("runs/clip"), help="where the model goes")
    make(parser.parse_args())


if __name__ == "__main__":
    main()
