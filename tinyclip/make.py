"""Makes a CLIP like the embedded one, into runs/clip: python tinyclip/make.py, in about an hour on 2 cores.

What it is, plainly: a stand-in, trained on captioned pictures of this very robot, including rollouts of policies that
were trained on its own rewards, so that everything here runs on any machine. It is not zero-shot, and its scores say
nothing about the paper's models, which never saw this robot.

    1. states     scripted, blended, mixed and random poses, settled under gravity by weak motors; random policies
    2. captions   computed from each state by geometry, so that any frame, however odd, has a true sentence
    3. training   contrastive, like CLIP's; but in a batch, every sentence that is true of a frame is a positive. And
                  the cosine of a frame and a sentence is pulled towards one value if it is true, another if not
    4. found      if found.npy is there: states of policies of long trainings on earlier models, some of them misled
    5. climbs     three times meanwhile, for each of the eight prompts: random poses are changed at random, and each
                  change is kept that the unfinished model rewards. What it likes, right or wrong, is found in minutes,
                  and joins the data with true captions
    6. policies   so do, once, the states of policies that SAC trains on the unfinished model's rewards

Six combinations, such as kneeling with raised arms, are kept from all of it (HELD_OUT): sentences to try it on.
No success condition and no hand-written reward is used here.
"""

import argparse
import json
import multiprocessing
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
import vlmrm  # before mujoco: it chooses how to draw
import sac
import open_clip
import torch
import torch.nn as nn
import torch.nn.functional as F
import gymnasium
import mujoco
import numpy as np
from safetensors.torch import save_file
from vlmrm import SIDES, X, Y, Z, Pose

FOLDER = Path(__file__).parent
FOUND = FOLDER / "found.npy"

# ----------------------------------------------------------------------------------------------------------------------
# Captions. Each frame gets three labels, each of them a list of sentences that are true of it.


def legs_of(p: Pose) -> np.ndarray:
    """What the legs and the trunk do: an index into LEGS, (N,). The first rule that holds names the pose."""
    up, facing = p.up[:, Z], p.facing[:, Z]
    pelvis, knees, feet, hands = p.pelvis[:, Z], p.knees[..., Z], p.feet[..., Z], p.hands[..., Z]
    thigh, shin, leg = p.knees - p.hips, p.feet - p.knees, p.feet - p.hips
    bend = np.degrees(
        np.arccos(
            np.clip(  # of each knee
                (thigh * shin).sum(-1) / np.linalg.norm(thigh, axis=-1) / np.linalg.norm(shin, axis=-1), -1, 1
            )
        )
    )
    aside = np.degrees(np.arctan2(leg[..., Y] * SIDES, leg[..., X]))  # of each leg: 0 forward, 90 to its side, 180 back
    aside[aside < -90] += 360
    out = p.knees[..., Y] * SIDES
    straight, on_foot = bend < 28, feet < 0.125
    on_knee = (knees < 0.105) & (p.knees[..., X] - p.feet[..., X] > 0.165)  # knee down, shin behind it
    lowest = np.minimum.reduce(
        [feet.min(1) - 0.075, knees.min(1) - 0.05, pelvis - 0.09, hands.min(1) - 0.04, p.head[:, Z] - 0.09]
    )
    upright, tilted, seated = up > 0.76, up > 0.3, pelvis < 0.26
    rules = {
        "air": lowest > 0.08,
        "lotus": upright
        & (pelvis < 0.31)
        & (knees < 0.155).all(1)
        & (out > 0.19).all(1)
        & (out - p.feet[..., Y] * SIDES > 0.06).all(1)
        & (np.abs(p.feet[..., X]) < 0.285).all(1)
        & (p.knees[..., X] > -0.035).all(1),
        "kneel": upright & on_knee.all(1) & (np.abs(out) < 0.285).all(1) & (pelvis > 0.38),
        "heels": upright & on_knee.all(1) & (np.abs(out) < 0.285).all(1) & (pelvis > 0.24),
        "knees_wide": upright & on_knee.all(1),
        "one_knee": upright & (on_knee.sum(1) == 1) & (on_foot & ~on_knee & (knees > 0.25)).any(1),
        "stand": (up > 0.82) & (pelvis > 0.78) & on_foot.all(1),
        "one_leg": (up > 0.82) & (pelvis > 0.76) & on_foot.any(1) & (feet.max(1) > 0.24),
        "step": upright & (pelvis > 0.74) & on_foot.any(1),
        "knees_bent": upright & (pelvis > 0.55) & (feet < 0.2).all(1),
        "squat": upright & (pelvis > 0.26) & (feet < 0.17).all(1) & (knees > 0.2).all(1),
        "splits": upright
        & (pelvis < 0.21)
        & straight.all(1)
        & (aside > 47).all(1)
        & (aside < 130).all(1)
        & (feet < 0.235).all(1),
        "front_splits": upright
        & seated
        & (bend < 40).all(1)
        & (aside.max(1) > 110)
        & (aside.min(1) < 47)
        & (aside.sum(1) > 110)
        & (feet < 0.235).all(1),
        "straddle": upright & seated & straight.all(1) & (aside.sum(1) > 36),
        "sit_long": upright & seated & straight.all(1),
        "half_splits": upright & (pelvis < 0.30) & (straight & (aside > 35) & (aside < 130)).any(1),
        "sit_bent": upright & seated & (knees > 0.2).all(1),
        "sit": upright & seated,
        "bow": (pelvis > 0.55) & on_foot.any(1) & (p.up[:, X] > 0.5) & (up > -0.7),
        "fours": (up < 0.5) & (facing < -0.5) & (knees < 0.16).all(1) & (hands < 0.16).all(1) & (pelvis > 0.28),
        "knees_bowed": tilted & on_knee.all(1) & (facing < -0.2),
        "knees_back": tilted & on_knee.all(1),
        "lean": tilted & (pelvis > 0.68) & on_foot.any(1),
        "fall": tilted & (pelvis > 0.45),
        "recline": tilted & (pelvis < 0.3) & (facing > 0.1),
        "slouch": tilted & (pelvis < 0.3),
        "supine": ~tilted & (facing > 0.6) & (pelvis < 0.45),
        "prone": ~tilted & (facing < -0.6) & (pelvis < 0.35),
        "side": ~tilted & (np.abs(facing) < 0.6) & (pelvis < 0.4),
        "awkward": np.ones(len(up), bool),
    }
    assert list(rules) == LEGS
    return np.argmax(np.stack(list(rules.values())), 0)


def arms_from_torso(p: Pose):
    """Seen from the torso, in metres, of each arm: how far the hand is up, forward and aside (outward) of the shoulder,
    how far the elbow is aside of it, the hand's distance from its hip, its height over the pelvis: six times (N, 2)."""
    across = np.cross(p.up, p.facing)  # (N, 3) the torso's leftward axis
    hand, elbow, low = p.hands - p.shoulders, p.elbows - p.shoulders, p.hands - p.pelvis[:, None]
    hip = p.hips - p.hips.mean(1, keepdims=True)  # (N, 2, 3) 0.1 m to each side, however the pelvis is turned
    hip = hip + 0.1 * hip / np.linalg.norm(hip, axis=-1, keepdims=True)  # the joint lies inside: to the skin
    return (
        *(
            (v * axis[:, None]).sum(-1) * side
            for v, axis, side in ((hand, p.up, 1), (hand, p.facing, 1), (hand, across, SIDES), (elbow, across, SIDES))
        ),
        np.linalg.norm(low - hip, axis=-1),
        (low * p.up[:, None]).sum(-1),
    )


def arms_of(p: Pose) -> np.ndarray:
    """What the arms do, seen from the torso: an index into ARMS, (N,)."""
    up, forward, aside, elbow_aside, from_hip, over_pelvis = arms_from_torso(p)
    raised = up > 0.23  # above the top of the head, which is 0.22 over the shoulders
    level = np.abs(up[:, :1] - up[:, 1:]) < 0.18
    across = (aside < -0.215) & (elbow_aside > aside) & (forward > 0.05) & level  # past the middle of the torso
    across &= (up > -0.34) & (up < 0.04)  # before the chest, not the face
    by_head = np.linalg.norm(p.hands - p.head[:, None], axis=-1) < 0.32
    rules = {
        "raised": raised.all(1),
        "crossed": across.all(1) & (p.hands[..., Y] * SIDES < -0.08).all(1),  # past the middle of the pelvis as well
        "half_crossed": across.all(1),  # of the torso only: the waist is turned, or they are not far past
        "hips": (from_hip < 0.14).all(1) & (elbow_aside > aside).all(1) & (over_pelvis > -0.06).all(1),
        "one_raised": raised.any(1) & (up.min(1) < 0.1),
        "sides": (aside > 0.33).all(1) & (np.abs(up) < 0.28).all(1),
        "forward": (forward > 0.30).all(1) & (np.abs(up) < 0.22).all(1) & (np.abs(aside - 0.08) < 0.25).all(1),
        "head": (up > -0.05).all(1) & by_head.all(1),
        "back": (up < -0.05).all(1) & (forward < -0.08).all(1) & (aside < 0.15).all(1),
        "one_across": ((aside < -0.17) & (forward > 0.05)).any(1),
        "chest": (np.abs(up + 0.16) < 0.2).all(1) & (forward > 0.05).all(1) & (aside < 0.12).all(1),
        "down": (up < -0.26).all(1) & (np.abs(aside) < 0.40).all(1),
        "one_side": ((aside > 0.33) & (np.abs(up) < 0.28)).any(1),
        "one_forward": ((forward > 0.30) & (np.abs(up) < 0.22)).any(1),
        "bent": (np.abs(up) <= 0.32).all(1),
        "other": np.ones(len(up), bool),
    }
    assert list(rules) == ARMS
    return np.argmax(np.stack(list(rules.values())), 0)


def trunk_of(p: Pose) -> np.ndarray:
    """How the torso leans: an index into TRUNK, (N,)."""
    rules = [p.up[:, Z] > 0.93, p.up[:, Z] < 0.3, p.up[:, X] > 0.36, p.up[:, X] < -0.36, np.ones(len(p.up), bool)]
    return np.argmax(np.stack(rules), 0)


HELD_OUT = [  # legs and arms whose combination is in no training frame and hence in no caption; each alone is in many
    ("kneel heels knees_wide", "raised"),
    ("lotus", "raised"),
    ("splits front_splits straddle", "raised"),
    ("kneel heels", "hips"),
    ("sit sit_long sit_bent straddle front_splits half_splits", "crossed"),
    ("squat knees_bent", "crossed"),
]
NEAR_HELD_OUT = {  # and what looks almost like them goes too, if it is low and upright enough: a fall stays
    "raised": "knees_bowed knees_back one_knee half_splits sit slouch awkward fall recline",
    "hips": "knees_wide knees_bowed knees_back awkward fall",
    "crossed": "slouch awkward lotus splits recline",
}


def held_out(p: Pose) -> np.ndarray:
    """Which frames are kept from training, (N,): those of HELD_OUT, and with a margin those that come near."""
    up, forward, aside, _, from_hip, over_pelvis = arms_from_torso(p)
    over_shoulder = (p.hands - p.shoulders)[..., Z]
    arms = {
        "raised": (np.maximum(up, over_shoulder) > 0.12).all(1),
        "crossed": (aside < -0.14).all(1) & (forward > 0).all(1),
        "hips": (from_hip < 0.20).all(1) & (over_pelvis > -0.12).all(1),
    }
    legs, almost = np.array(LEGS)[legs_of(p)], (p.up[:, Z] > 0.55) & (p.pelvis[:, Z] < 0.6)
    return np.logical_or.reduce(
        [
            (np.isin(legs, names.split()) | np.isin(legs, NEAR_HELD_OUT[name].split()) & almost) & arms[name]
            for names, name in HELD_OUT
        ]
    )


LEGS = (
    "air lotus kneel heels knees_wide one_knee stand one_leg step knees_bent squat splits front_splits straddle "
    "sit_long half_splits sit_bent sit bow fours knees_bowed knees_back lean fall recline slouch supine prone side "
    "awkward"
).split()
ARMS = (
    "raised crossed half_crossed hips one_raised sides forward head back one_across chest down one_side one_forward "
    "bent other"
).split()
TRUNK = ["upright", "lying", "forward", "back", "sideways"]

# sentences, and of which labels they are true
LEG_PHRASES = [
    ("kneeling|on its knees|kneeling on both knees|kneeling down|on both knees|kneeling on the floor", "kneel heels"),
    ("kneeling upright|kneeling tall|standing on its knees", "kneel"),
    ("kneeling, sitting on its heels|sitting back on its heels|kneeling low", "heels"),
    ("kneeling with its knees wide apart|on its knees, legs spread", "knees_wide"),
    ("kneeling on one knee|on one knee|down on one knee|in a lunge|proposing", "one_knee"),
    (
        "seated down, meditating in the lotus position|meditating|in the lotus position|sitting cross-legged"
        "|doing yoga, in the lotus pose|seated with crossed legs|sitting and meditating",
        "lotus",
    ),
    ("standing up|standing|standing upright|standing straight|standing on both feet|on its feet", "stand"),
    (
        "standing up on one leg|standing on one leg|balancing on one leg|on one leg|with one foot in the air"
        "|lifting one leg",
        "one_leg",
    ),
    ("standing with bent knees|bending its knees|half crouching", "knees_bent"),
    ("squatting|crouching|in a squat|squatting low|crouching down", "squat"),
    (
        "practicing gymnastics, doing the side splits|doing the side splits|in the side splits|doing the splits"
        "|doing side splits on the floor",
        "splits",
    ),
    (
        "doing the front splits|in the front splits|doing front splits on the floor"
        "|doing the splits with one leg forward and one leg back",
        "front_splits",
    ),
    ("sitting with its legs apart|sitting in a straddle|seated with spread legs", "straddle"),
    ("sitting with its legs stretched forward|sitting with straight legs", "sit_long"),
    (
        "sitting with one leg stretched to the side|doing half of the splits|in the splits with one knee bent",
        "half_splits",
    ),
    ("sitting with its knees up|sitting with bent knees|hugging its knees", "sit_bent"),
    (
        "sitting on the floor|seated|sitting down|seated on the ground|sitting",
        "straddle sit_long sit_bent sit half_splits splits front_splits lotus",
    ),
    ("bending forward|bowing|bent over|touching its toes", "bow"),
    ("on all fours|on its hands and knees|crawling", "fours"),
    ("prostrating|bowing low|crouched over its legs", "knees_bowed"),
    ("bending over backwards|doing a limbo|tipping back over its shins", "knees_back"),
    ("taking a step|walking|lifting its heel", "step"),
    ("tilting|swaying|off balance", "lean"),
    ("falling|falling over|losing its balance|toppling|tripping", "fall"),
    ("reclining|leaning back on the floor", "recline"),
    ("slouching|hunched over", "slouch"),
    ("lying on its back|face up on the floor", "supine"),
    ("lying on its belly|lying face down|prone", "prone"),
    ("lying on its side", "side"),
    ("lying down|lying on the floor|lying", "supine prone side"),
    ("collapsed|in a heap|slumped on the floor|sprawling|in an awkward position|fallen", "awkward"),
    ("jumping|in the air|floating|off the ground", "air"),
]
ARM_PHRASES = [
    ("with its arms crossed|with arms crossed|with crossed arms|crossing its arms|with its arms folded", "crossed"),
    ("holding both elbows|holding its elbows|with its forearms laid on each other", "half_crossed"),
    ("with hands on hips|with its hands on its hips|hands on hips|with both hands on the hips|arms akimbo", "hips"),
    (
        "with both arms raised|with arms raised|with its hands up|raising both arms|with both hands above its head"
        "|arms up",
        "raised",
    ),
    ("with one arm raised|raising one hand|waving|with one hand up", "one_raised"),
    ("with its arms out to the sides|with arms spread|in a T-pose|arms outstretched", "sides"),
    ("with its arms stretched forward|reaching forward|with its hands in front", "forward"),
    ("with its hands at its head|holding its head|with both hands beside its head|covering its face", "head"),
    ("with its hands behind its back|with its arms behind it", "back"),
    ("with its hands before its chest|praying|with its hands together", "chest"),
    ("with one arm across its chest|with one arm folded|holding its own arm", "one_across"),
    ("with one arm out to the side|pointing to the side", "one_side"),
    ("with one arm stretched forward|pointing forward|reaching out with one hand", "one_forward"),
    ("with bent arms|with its elbows bent", "bent"),
    ("with its arms down|with its arms hanging|with arms at its sides|arms down", "down"),
]
TRUNK_PHRASES = [
    ("with an upright torso|with a straight back|upright", "upright"),
    ("leaning forward|leaning over", "forward"),
    ("leaning back|leaning backwards", "back"),
    ("leaning to the side|tilting sideways", "sideways"),
]
SUBJECTS = ["a humanoid robot"] * 6 + [
    "a robot",
    "the robot",
    "a humanoid",
    "a photo of a humanoid robot",
    "a picture of a robot",
]


def phrase_table(phrases, labels):
    """All sentences, and a (sentences, labels) table of what is true of what; row 0 is silence, true of everything."""
    sentences, rows = [""], [np.ones(len(labels), bool)]
    for variants, true_of in phrases:
        for sentence in variants.split("|"):
            sentences.append(sentence)
            rows.append(np.isin(labels, true_of.split()))
            assert rows[-1].sum() == len(true_of.split()), true_of
    return sentences, np.array(rows)


TABLES = [phrase_table(LEG_PHRASES, LEGS), phrase_table(ARM_PHRASES, ARMS), phrase_table(TRUNK_PHRASES, TRUNK)]


def write_captions(labels, rng):
    """labels (B, 3) -> B sentences, one true of each frame, and (B, 3) what each says: rows of the three TABLES."""
    sentences, says = [], np.zeros_like(labels)
    for i, row in enumerate(labels):
        if rng.random() > 0.12:  # else the bare baseline, true of every frame
            for part, chance in enumerate((0.9, 0.6, 0.15)):
                true = np.flatnonzero(TABLES[part][1][1:, row[part]]) + 1
                if len(true) and rng.random() < chance:
                    says[i, part] = rng.choice(true)
        words = (
            [TABLES[part][0][says[i, part]] for part in rng.permutation(3) if says[i, part]]
            if rng.random() < 0.2
            else [TABLES[part][0][says[i, part]] for part in range(3) if says[i, part]]
        )
        subject = SUBJECTS[rng.integers(len(SUBJECTS))]
        sentences.append((subject + " " + (", " if rng.random() < 0.5 else " ").join(words)).strip())
    return sentences, says


def truth(labels, says):
    """labels (B, 3) of frames, says (C, 3) of sentences -> (B, C): is sentence j true of frame i?"""
    return np.logical_and.reduce([TABLES[part][1][says[:, part]][:, labels[:, part]] for part in range(3)]).T


# ----------------------------------------------------------------------------------------------------------------------
# States: MuJoCo's qpos (24,), root position, root quaternion, 17 joint angles

both = None
POSES = [  # degrees: (hip_x, hip_z, hip_y, knee) of the left leg, of the right; abdomen_y, the torso's pitch, its roll
    # stand (often: half of the prompts ask for it, with other arms), squat, bow
    *[((0, 0, 0, -2), both)] * 30,
    ((0, 0, -35, -60), both, -10),
    ((-5, -25, -95, -125), both, -30, 15),
    ((-10, -40, -105, -150), both, -40, 15),
    ((0, 0, -40, -5), both, -50, 20),
    ((-20, 0, 0, -2), both),
    # one leg
    ((0, 0, 0, -2), (0, 0, -60, -80)),
    ((0, 0, 0, -2), (0, 0, -60, -5)),
    ((0, 0, 0, -2), (-25, -10, -20, -10)),
    ((0, 0, 0, -2), (0, 0, 5, -110)),
    ((0, 0, 0, -2), (-25, -55, -60, -130)),
    ((0, 0, 0, -2), (0, 0, -25, -60)),
    # kneel, one knee, all fours
    ((0, 0, 0, -90), both),
    ((-20, -10, 0, -90), both),
    ((0, 0, -15, -110), both),
    ((0, 0, -60, -150), both),
    ((-5, -15, -70, -158), both),
    ((0, 0, -50, -140), both, -60, 30),
    ((0, 0, 0, -95), (0, 0, -90, -90)),
    ((0, 0, 15, -60), (0, 0, -80, -80)),
    ((0, 0, -90, -90), both, -5, 85),
    ((0, 0, -60, -90), (0, 0, -100, -90), -10, 80),
    # lotus
    ((-10, -48, -30, -158), both, -30),
    ((-15, -55, -85, -155), both, 20, 15),
    ((-5, -55, -60, -155), both),
    ((-17, -50, -95, -158), both, 22, 20),
    ((0, -52, -24, -158), both, -18, -30),
    ((-4, -57, -28, -157), both, -50),
    # sit
    ((0, 0, -85, -5), both),
    ((0, 0, -100, -70), both),
    ((0, 0, -110, -130), both, -20, -10),
    # splits, straddle, half of the splits
    *[((-25, -60, -80, -2), both), ((-25, -58, -70, -4), both, -10), ((-15, -35, -85, -5), both)] * 3,  # few stay so
    ((-25, -60, -80, -60), both),
    ((-25, -60, -80, -2), (0, -20, -85, -120)),
    ((-25, -60, -80, -2), (0, 0, -30, -150)),
    ((0, 0, 20, -5), (0, 0, -100, -5)),
    # lie, curl, fall
    ((0, 0, 0, -5), both, 0, -88),
    ((0, 0, 0, -5), both, 0, 88),
    ((0, 0, 10, -80), both, 20, -80),
    ((0, 0, -100, -120), both, -40, -80),
    ((0, 0, -20, -20), both, -10, 0, 85),
    ((0, 0, 0, -5), both, 0, 30),
    ((0, 0, 0, -20), both, 0, -30),
]
LEG_JOINTS = [f"{side}_{joint}" for side in ("left", "right") for joint in ("hip_x", "hip_z", "hip_y", "knee")]
ARM_JOINTS = [f"{side}_{joint}" for side in ("left", "right") for joint in ("shoulder1", "shoulder2", "elbow")]


def quaternion(yaw, pitch, roll):  # radians
    result = np.zeros(4)
    mujoco.mju_euler2Quat(result, np.array([yaw, pitch, roll]), "zyx")
    return result


class Body:
    """The simulator, to put the robot into poses and let go of it."""

    def __init__(self):
        self.model = vlmrm.Scene().model
        self.data = mujoco.MjData(self.model)
        self.low, self.high = self.model.jnt_range[1:].T  # (17,) radians
        address = {self.model.joint(j).name: self.model.joint(j).qposadr[0] for j in range(1, self.model.njnt)}
        self.legs, self.arms = [address[name] for name in LEG_JOINTS], [address[name] for name in ARM_JOINTS]
        self.abdomen, self.waist = address["abdomen_y"], [address["abdomen_x"], address["abdomen_z"]]
        self.motors = np.array([address[self.model.actuator(i).name] for i in range(self.model.nu)])
        self.gear = self.model.actuator_gear[:, 0]

    def scripted(self, rng):
        left, right, abdomen, pitch, roll = (*POSES[rng.integers(len(POSES))], 0, 0, 0)[:5]
        legs = [left, right or left]
        if rng.random() < 0.5:
            legs.reverse()
        qpos = self.model.qpos0.copy()
        qpos[self.legs] = np.deg2rad(np.concatenate(legs))
        qpos[self.abdomen] = np.deg2rad(abdomen)
        qpos[3:7] = quaternion(0, *np.deg2rad([pitch, roll]))
        return qpos

    def ground(self, qpos, clearance):
        """Joint limits kept, and the lowest point put `clearance` metres above the floor."""
        qpos[7:] = np.clip(qpos[7:], self.low, self.high)
        self.data.qpos[:] = qpos
        qpos[2] -= vlmrm.lowest_point(self.model, self.data) - clearance
        return qpos

    def settle(self, qpos, stiffness, snapshots):
        """Gravity acts while motors (stiffness: N m/rad) hold the pose: the states after `snapshots` steps of 15 ms."""
        mujoco.mj_resetData(self.model, self.data)
        self.data.qpos[:] = qpos
        states = []
        for i in range(max(snapshots) + 1):
            if i in snapshots:
                states.append(self.data.qpos.copy())
            torque = (
                stiffness * (qpos - self.data.qpos)[self.motors] - 0.1 * stiffness * self.data.qvel[self.motors - 1]
            )
            self.data.ctrl[:] = np.clip(torque / self.gear, -0.4, 0.4)
            mujoco.mj_step(self.model, self.data, nstep=5)
        return states


def arm_library(body, rng, each=200):
    """Angles of both arms (n, 6), as many of each of ARMS, by trying random ones; more of the prompts'."""
    limits = body.low[[a - 7 for a in body.arms]], body.high[[a - 7 for a in body.arms]]
    angles = rng.uniform(*limits, (40_000, 6))
    mirrored = rng.random(len(angles)) < 0.7
    angles[mirrored, 3:] = angles[mirrored, :3] * [-1, -1, 1] + rng.normal(0, 0.1, (mirrored.sum(), 3))
    states = np.tile(body.model.qpos0, (len(angles), 1))
    states[:, body.arms] = np.clip(angles, *limits)
    labels = arms_of(vlmrm.measure_states(body.model, states))
    kinds = [*range(len(ARMS)), *(ARMS.index(name) for name in ("raised", "crossed", "hips") for _ in range(2))]
    return np.concatenate(
        [states[labels == k][rng.integers((labels == k).sum(), size=each)][:, body.arms] for k in kinds]
    )


def pose(body, arms, rng):
    """A pose near the floor: scripted, between two, each leg from another, or random; then jittered, turned, tilted."""
    qpos, kind = body.scripted(rng), rng.random()
    if kind < 0.22:
        t = rng.random()
        qpos = (1 - t) * qpos + t * body.scripted(rng)
    elif kind < 0.40:
        qpos[body.legs[4:]] = body.scripted(rng)[body.legs[4:]]
    elif kind < 0.47:
        qpos[7:] = rng.uniform(body.low, body.high)
    if rng.random() < 0.4:  # policies like to twist
        qpos[body.waist] = rng.uniform(body.low, body.high)[[a - 7 for a in body.waist]]
    qpos[7:] += np.deg2rad(rng.choice([2, 6, 12])) * rng.standard_normal(17)
    qpos[body.arms] = arms[rng.integers(len(arms))] + np.deg2rad(4) * rng.standard_normal(6)
    yaw = rng.normal(0, 0.35) if rng.random() < 0.8 else rng.uniform(-np.pi, np.pi)
    tilt = np.deg2rad(rng.choice([3, 8, 25], p=[0.5, 0.35, 0.15]) * rng.standard_normal(2))
    turned = np.zeros(4)
    mujoco.mju_mulQuat(turned, quaternion(yaw, *tilt), qpos[3:7] / np.linalg.norm(qpos[3:7]))
    qpos[3:7] = turned
    return body.ground(qpos, 0.01 if rng.random() < 0.93 else rng.uniform(0, 0.5))


def make_states(seed, poses, settled, episodes):
    """One process' share: `poses` as they are, `settled` ones (5 snapshots each), `episodes` of random policies."""
    rng, body = np.random.default_rng(seed), Body()
    arms = arm_library(body, rng)
    states = [pose(body, arms, rng) for _ in range(poses)]
    for _ in range(settled):
        snapshots = np.sort(rng.choice(np.arange(2, 80), 5, replace=False))
        states += body.settle(pose(body, arms, rng), rng.choice([0, 20, 60, 150, 300, 600]), snapshots)
    for _ in range(episodes):
        mujoco.mj_resetData(body.model, body.data)
        body.data.qpos[:] += rng.uniform(-0.01, 0.01, 24)
        action, memory = np.zeros(17), rng.choice([0, 0.8, 0.95])
        for i in range(100):
            action = memory * action + np.sqrt(1 - memory**2) * rng.uniform(-0.7, 0.7, 17)
            body.data.ctrl[:] = np.clip(action, -0.4, 0.4)
            mujoco.mj_step(body.model, body.data, nstep=5)
            if i % 4 == 0:
                states.append(body.data.qpos.copy())
    return np.array(states, np.float32)


def changed(body, arms, qpos, rng):
    """The pose with one thing changed: some joints a little, one arm or leg more, both arms, or how it is turned."""
    qpos, kind = qpos.copy(), rng.random()
    if kind < 0.5:
        some = rng.random(17) < 0.4
        qpos[7:] += np.deg2rad(rng.choice([2, 5, 12])) * rng.standard_normal(17) * some
    elif kind < 0.75:
        limbs = body.legs[:4], body.legs[4:], body.arms[:3], body.arms[3:]
        limb = limbs[rng.integers(4)]
        qpos[limb] += np.deg2rad(rng.choice([5, 15])) * rng.standard_normal(len(limb))
    elif kind < 0.85:
        qpos[body.arms] = arms[rng.integers(len(arms))]
    else:
        turned = np.zeros(4)
        mujoco.mju_mulQuat(turned, quaternion(*np.deg2rad(rng.choice([3, 10]) * rng.standard_normal(3))), qpos[3:7])
        qpos[3:7] = turned / np.linalg.norm(turned)
    return body.ground(qpos, 0.005)


def climb(prompt, rng, model, climbers=96, tries=120, alpha=0.5):
    """What a CLIP likes, found without a policy: the best fifth of random poses, of which every change stays that earns
    more. Returns the poses after a third, two thirds and all of the tries, (3, climbers, 24)."""
    body, kept = Body(), []
    arms, clip = arm_library(body, rng), vlmrm.CLIP(model)
    reward_fn, scene = vlmrm.VLMReward(clip, prompt, alpha=alpha), vlmrm.Scene(clip.size)

    def reward(states):
        return np.where(
            held_out(vlmrm.measure_states(body.model, states)), -1, reward_fn(vlmrm.render_states(scene, states))
        )

    states = np.array([pose(body, arms, rng) for _ in range(5 * climbers)])
    rewards = reward(states)
    best = np.argsort(rewards)[-climbers:]
    states, rewards = states[best], rewards[best]
    for i in range(tries):
        others = np.array([changed(body, arms, qpos, rng) for qpos in states])
        earned = reward(others)
        better = earned > rewards
        states[better], rewards[better] = others[better], earned[better]
        if i + 1 in (tries // 3, 2 * tries // 3, tries):
            kept.append(states.astype(np.float32))
    return np.array(kept)


def climbed_states(prompt, seed, folder):
    """The poses of a climb, and what lies around those where it ended, (n, 24)."""
    torch.set_num_threads(1)
    rng = np.random.default_rng(seed)
    kept = climb(prompt, rng, f"local-dir:{folder}")
    return np.concatenate([*kept, around(Body(), kept[-1], rng)])


def visited_states(prompt, seed, steps, folder):
    """Trains SAC on the reward of the CLIP in `folder` for a prompt. Returns all states it met, in order (N, 24)."""
    torch.set_num_threads(1)
    visited = []

    class Recorder(vlmrm.Humanoid):
        def step(self, action):
            result = super().step(action)
            visited.append(self.data.qpos.astype(np.float32))
            return result

    clip = vlmrm.CLIP(f"local-dir:{folder}")
    reward_fn, scene = vlmrm.VLMReward(clip, prompt), vlmrm.Scene(clip.size)

    def make():
        return gymnasium.wrappers.TimeLimit(Recorder(scene), 100)

    envs, eval_envs = (gymnasium.vector.SyncVectorEnv([make] * 16, autoreset_mode="Disabled") for _ in range(2))
    agent = sac.SAC(envs.single_observation_space, envs.single_action_space, sac.Config(steps=steps, seed=seed))
    best = max(row.get("eval_reward", 0) for row in sac.train(agent, envs, eval_envs, reward_fn))
    print(f"  {prompt}: best reward {best:.3f}", flush=True)
    return np.array(visited)


def around(body, states, rng):
    """What lies around states: their joints jittered by 5 or 15 degrees, and where they then settle (3 of each)."""
    near = []
    for qpos in states.astype(float):
        qpos[7:] += np.deg2rad(rng.choice([5, 15])) * rng.standard_normal(17)
        near += body.settle(body.ground(qpos, 0.005), rng.choice([60, 300]), [0, 15, 40])
    return np.array(near, np.float32)


def on_policy_states(prompt, seed, steps, keep, folder):
    """`keep` states of visited_states, later ones more often, and what lies around the places where it ended up."""
    visited, rng, body = visited_states(prompt, seed, steps, folder), np.random.default_rng(seed), Body()
    weight = np.linspace(0.2, 1, len(visited))
    kept = visited[rng.choice(len(visited), keep, replace=False, p=weight / weight.sum())]
    late = visited[-len(visited) // 3 :]
    return np.concatenate([kept, around(body, late[rng.integers(len(late), size=keep // 8)], rng)])


def played_states(run, keep=100):
    """`keep` states from 16 episodes of the policy of a finished run: half of them exploring, half deterministic."""
    envs = vlmrm.make_envs(vlmrm.Scene(), count=16)
    hidden = json.loads((run / "config.json").read_text())["hidden"]
    agent = sac.SAC(envs.single_observation_space, envs.single_action_space, sac.Config(hidden=hidden))
    agent.load_state_dict(torch.load(run / "policy.pt", "cpu", weights_only=True))
    rng, states = np.random.default_rng(0), []

    def act(obs):
        states.extend(env.unwrapped.data.qpos.astype(np.float32) for env in envs.envs)
        return np.concatenate([agent.act(obs)[:8], agent.best_action(obs)[8:]])

    sac.rollout(envs, act, 100, None, seed=5 * 10**9)
    return np.array(states)[rng.choice(len(states), keep, replace=False)]


def render(states, size):
    """(N, 24) -> uint8 (N, size, size, 3)."""
    return vlmrm.render_states(vlmrm.Scene((size, size)), states)


def label(states):
    pose = vlmrm.measure_states(vlmrm.Scene().model, states)
    return np.stack([legs_of(pose), arms_of(pose), trunk_of(pose)], 1)


def in_parallel(function, jobs, processes=2):
    """function(*job) for each job, in fresh processes: a forked one would inherit a renderer that it cannot use."""
    with multiprocessing.get_context("spawn").Pool(processes) as pool:
        return pool.starmap(function, jobs, chunksize=1)


# ----------------------------------------------------------------------------------------------------------------------
# Training


def architecture(width=16, size=96):
    """A miniature of CLIP's own RN50: one block a stage instead of 3, 4, 6, 3, and a quarter of the width."""
    return dict(
        embed_dim=64,
        vision_cfg=dict(layers=[1, 1, 1, 1], width=width, head_width=width * 4, image_size=size),
        text_cfg=dict(context_length=32, vocab_size=49408, width=32, heads=2, layers=2),
    )


PREPROCESS = dict(mean=[0.5] * 3, std=[0.25] * 3, interpolation="bicubic", resize_mode="shortest")


def train(frames, labels, config, steps, seed=0, batch_size=256, grow=None, trained=None):
    """A model of frames (N, H, W, 3) and labels (N, 3); grow(model, i) gives more of both after quarter i = 1, 2, 3.
    Or a `trained` model, trained further; grow(model, 1) gives more after half of that."""
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    model = (trained or open_clip.CLIP(**config)).requires_grad_().to(memory_format=torch.channels_last)
    tokenizer = open_clip.SimpleTokenizer(context_length=config["text_cfg"]["context_length"])
    with torch.no_grad():  # a word that no caption uses stays silent
        used = tokenizer([s + " " + p for s in SUBJECTS for p in sum((t[0] for t in TABLES), [])] + [", "]).unique()
        mask = torch.zeros(49408, 1).index_fill_(0, used, 1)
        model.token_embedding.weight.mul_(mask)
    heads = nn.ModuleList(nn.Linear(64, len(names)) for names in (LEGS, ARMS, TRUNK))  # only for training
    line = nn.Parameter(torch.tensor([1.2, 0.28] if trained else [1.6, 0.0]))  # a trained model's fit, or a start
    parameters = [*model.parameters(), *heads.parameters(), line]
    optimizer = torch.optim.AdamW(parameters, weight_decay=0.02, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-3 if trained else 2e-3, steps, pct_start=0.1)
    mean, std = (torch.tensor(PREPROCESS[k]).view(3, 1, 1) for k in ("mean", "std"))
    model.train()
    bf16 = torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    start, report = time.time(), np.zeros(5)
    turns = [0, steps // 2] if trained else [0, steps // 4, steps // 2, 3 * steps // 4]
    for i in range(steps):
        if i in turns:
            if i and grow:
                frames, labels = (np.concatenate(p) for p in zip((frames, labels), grow(model, turns.index(i))))
            counts = (np.bincount(labels[:, k])[labels[:, k]] for k in (0, 1))
            chance = np.prod([1 / np.sqrt(count) for count in counts], 0)  # rare legs and arms are drawn more often
            order = iter(rng.choice(len(frames), (steps - i, batch_size), p=chance / chance.sum()))
        rows = next(order)
        x = torch.from_numpy(frames[rows]).permute(0, 3, 1, 2).float() / 255
        x = (x * (1 + 0.1 * torch.randn(len(x), 1, 1, 1)) - mean) / std
        sentences, says = write_captions(np.tile(labels[rows], (2, 1)), rng)  # two of each frame
        true = torch.from_numpy(truth(labels[rows], says)).float()  # (B frames, 2B sentences)
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):  # 1.5 times as fast where a CPU has it; else a tenth
            image = model.encode_image(x.contiguous(memory_format=torch.channels_last))
        image = F.normalize(image.float(), dim=-1)
        text = F.normalize(model.encode_text(tokenizer(sentences)), dim=-1)
        cosine = image @ text.T  # (B, 2B)
        logits = model.logit_scale.exp().clamp(max=30) * cosine
        contrastive = (
            -((true / true.sum(1, keepdim=True)) * logits.log_softmax(1)).sum(1).mean() / 2
            - ((true / true.sum(0)) * logits.log_softmax(0)).sum(0).mean() / 2
        )
        y = torch.from_numpy(labels[rows])
        auxiliary = [F.cross_entropy(head(image) * 10, y[:, k]) for k, head in enumerate(heads)]
        squared = (line[0] * cosine + line[1] - true).square().mean()  # a cosine says true or not, no more;
        weight = 20 if trained else 20 * i / steps  # in a new model, full weight from the start: learns less
        loss = contrastive + weight * squared + 0.5 * sum(auxiliary)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        with torch.no_grad():
            model.token_embedding.weight.mul_(mask)
        report += [contrastive.item(), squared.item(), *(a.item() for a in auxiliary)]
        if (i + 1) % 100 == 0:
            names = "contrastive", "squared", "legs", "arms", "trunk"
            print(
                f"  step {i + 1}/{steps}",
                *(f"{name} {value / 100:.3f}" for name, value in zip(names, report)),
                f"{time.time() - start:.0f} s",
                flush=True,
            )
            report[:] = 0
    return model.eval()


def save(model, config, folder):
    folder.mkdir(exist_ok=True, parents=True)
    (folder / "open_clip_config.json").write_text(
        json.dumps(dict(model_cfg=config, preprocess_cfg=PREPROCESS), indent=1) + "\n"
    )
    half = {
        k: (v.half() if v.is_floating_point() and "running" not in k else v).contiguous()
        for k, v in model.state_dict().items()
    }
    save_file(half, folder / "open_clip_model.safetensors")


def family_member(states, width, seed, args):
    torch.set_num_threads(1)
    states, config = np.load(states), architecture(width, args.size)
    model = train(render(states, args.size), label(states), config, args.steps, seed)
    save(model, config, args.out / f"width{width}-seed{seed}")


def main():
    parser = argparse.ArgumentParser(
        description="Makes a CLIP like the embedded one.", formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("runs/clip"), help="where the model goes")
    parser.add_argument("--steps", type=int, default=4000, help="training steps")
    parser.add_argument("--policy-steps", type=int, default=20_000, help="environment steps of each policy")
    parser.add_argument("--width", type=int, default=16, help="of the image tower")
    parser.add_argument("--size", type=int, default=96, help="of the frames, in pixels")
    parser.add_argument("--keep", type=Path, help="a .npy file for the states that it was trained on")
    parser.add_argument(
        "--further",
        type=Path,
        metavar="KEPT",
        help="train the embedded CLIP further for --steps: on the states that --keep kept of its training, those of "
        "found.npy, half as many new ones as a training begins with, and what climbs find once",
    )
    parser.add_argument(
        "--family",
        type=Path,
        metavar="KEPT",
        help="train several widths and seeds for --steps on the states that --keep kept, into folders under --out",
    )
    parser.add_argument(
        "--find",
        nargs="+",
        type=Path,
        metavar="RUN",
        help="make nothing: add states of the policies of these finished runs to found.npy",
    )
    args = parser.parse_args()
    if args.find:
        found = [np.load(FOUND) for _ in range(FOUND.exists())] + [played_states(run) for run in args.find]
        return np.save(FOUND, np.concatenate(found).astype(np.float16))
    if args.family:
        return in_parallel(
            family_member, [(args.family, width, seed, args) for width in (24, 16, 8, 4, 2) for seed in range(2)]
        )
    start, config = time.time(), architecture(args.width, args.size)

    def draw(states):
        return np.concatenate(in_parallel(render, [(half, args.size) for half in np.array_split(states, 2)]))

    def log(text):
        print(f"[{(time.time() - start) / 60:.1f} min] {text}", flush=True)

    def admit(states):
        return states[~held_out(vlmrm.measure_states(vlmrm.Scene().model, states))]

    kept = np.load(args.further) if args.further else np.zeros((0, 24), np.float32)
    new = len(kept)  # other seeds for other poses
    states = [kept, *in_parallel(make_states, [(new + seed, 5500, 1250, 75) for seed in range(2 if new else 4)])]
    if FOUND.exists():
        found = np.load(FOUND).astype(np.float32)
        states += [found, around(Body(), np.tile(found, (3, 1)), np.random.default_rng(4))]
    states = [admit(np.concatenate(states))]
    log(f"{len(states[0])} states to begin with")

    def grow(model, turn):
        save(model, config, args.out)
        prompts = [prompt for prompt, _ in vlmrm.TASKS.values()]
        found = in_parallel(
            climbed_states, [(prompt, new + 100 * turn + i, args.out) for i, prompt in enumerate(prompts)]
        )
        if turn == 2:
            jobs = [(prompt, i, args.policy_steps, 2000, args.out) for i, prompt in enumerate(prompts)]
            found += in_parallel(on_policy_states, jobs)
        states.append(admit(np.concatenate(found)))
        log(f"{len(states[-1])} states more")
        return draw(states[-1]), label(states[-1])

    labels = label(states[0])
    for k, names in enumerate((LEGS, ARMS, TRUNK)):
        counts = np.bincount(labels[:, k], minlength=len(names))
        print("  " + ", ".join(f"{name} {count}" for name, count in zip(names, counts)))
    trained = vlmrm.CLIP(vlmrm.EMBEDDED_CLIP, device="cpu").model.float() if args.further else None
    model = train(draw(states[0]), labels, config, args.steps, grow=grow, trained=trained)
    save(model, config, args.out)
    log(f"a model in {args.out}")
    if args.keep:
        np.save(args.keep, np.concatenate(states))


if __name__ == "__main__":
    main()
