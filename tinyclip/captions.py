"""What the training of the embedded CLIP calls a pose: labels by geometry, and sentences.

A frame gets three labels: what its legs and trunk do (LEGS), what its arms do (ARMS), and how the
torso leans (TRUNK). They are measured in the simulator, so that any pose, however odd, has true
ones. Nearly every label has sentences that are true of it; a caption is put together from those.
The rules mirror the success conditions of the tasks, most of them a little stricter. Six
combinations, such as kneeling with raised arms, are kept from training (HELD_OUT).
"""

import numpy as np
from vlmrm import SIDES, X, Y, Z, Pose

# --------------------------------------------------------------------------------------------------
# Labels. Of each kind, the first rule that holds names the pose, and the last one always holds.

LEGS = (
    "air lotus kneel heels knees_wide one_knee stand one_leg step knees_bent squat splits "
    "front_splits straddle sit_long half_splits sit_bent sit bow fours knees_bowed knees_back lean "
    "fall recline slouch supine prone side awkward"
).split()
UPRIGHT_LEGS = [  # where among LEGS those are whose rule asks for an upright torso
    LEGS.index(name)
    for name in "lotus kneel heels knees_wide one_knee stand one_leg step knees_bent squat splits "
    "front_splits straddle sit_long half_splits sit_bent sit".split()
]
ARMS = (
    "raised crossed hips one_raised sides forward head back one_across chest down "
    "one_side one_forward bent other"
).split()
TRUNK = ["upright", "lying", "forward", "back", "sideways"]


def legs_of(p: Pose) -> np.ndarray:
    """What the legs and the trunk do in N poses: an index into LEGS, (N,)."""
    up, facing = p.up[:, Z], p.facing[:, Z]
    pelvis, knees, feet, hands = p.pelvis[:, Z], p.knees[..., Z], p.feet[..., Z], p.hands[..., Z]
    leg = p.feet - p.hips
    bend = degrees_between(p.knees - p.hips, p.feet - p.knees)  # of each knee, (N, 2)
    # of each leg, seen from above: 0 forward, 90 to its own side, 180 back
    aside = np.degrees(np.arctan2(leg[..., Y] * SIDES, leg[..., X]))
    aside[aside < -90] += 360
    out = p.knees[..., Y] * SIDES
    inward = out - p.feet[..., Y] * SIDES  # how far the foot is inwards of its knee
    straight, on_foot = bend < 28, feet < 0.125
    on_knee = (knees < 0.105) & (p.knees[..., X] - p.feet[..., X] > 0.165)  # the shin behind it
    lowest = np.minimum.reduce(  # lowest point of the body: centres less radii
        [
            feet.min(1) - 0.075,
            knees.min(1) - 0.05,
            pelvis - 0.09,
            hands.min(1) - 0.04,
            p.head[:, Z] - 0.09,
        ]
    )
    upright, tilted, lying = up > 0.71, up > 0.3, ~(up > 0.3)  # within 45 degrees, within 73
    seated = upright & (pelvis < 0.26)
    on_knees = on_knee.all(1)
    knees_near = upright & on_knees & (np.abs(out) < 0.285).all(1)
    sideways = straight & (aside > 35) & (aside < 130)
    rules = {
        "air": lowest > 0.08,
        "lotus": upright
        & (pelvis < 0.31)
        & (knees < 0.155).all(1)
        & (out > 0.19).all(1)
        & (inward > 0.06).all(1)
        & (np.abs(p.feet[..., X]) < 0.285).all(1)
        & (p.knees[..., X] > -0.035).all(1),
        "kneel": knees_near & (pelvis > 0.38),
        "heels": knees_near & (pelvis > 0.24),
        "knees_wide": upright & on_knees,
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
        "front_splits": seated
        & (bend < 40).all(1)
        & (aside.max(1) > 110)
        & (aside.min(1) < 47)
        & (aside.sum(1) > 110)
        & (feet < 0.235).all(1),
        "straddle": seated & straight.all(1) & (aside.sum(1) > 36),
        "sit_long": seated & straight.all(1),
        "half_splits": upright & (pelvis < 0.30) & sideways.any(1),
        "sit_bent": seated & (knees > 0.2).all(1),
        "sit": seated,
        "bow": (pelvis > 0.55) & on_foot.any(1) & (p.up[:, X] > 0.5) & (up > -0.7),
        "fours": (up < 0.5)
        & (facing < -0.5)
        & (knees < 0.16).all(1)
        & (hands < 0.16).all(1)
        & (pelvis > 0.28),
        "knees_bowed": tilted & on_knees & (facing < -0.2),
        "knees_back": tilted & on_knees,
        "lean": tilted & (pelvis > 0.68) & on_foot.any(1),
        "fall": tilted & (pelvis > 0.45),
        "recline": tilted & (pelvis < 0.3) & (facing > 0.1),
        "slouch": tilted & (pelvis < 0.3),
        "supine": lying & (facing > 0.6) & (pelvis < 0.45),
        "prone": lying & (facing < -0.6) & (pelvis < 0.35),
        "side": lying & (np.abs(facing) < 0.6) & (pelvis < 0.4),
        "awkward": np.ones(len(up), bool),
    }
    return first_of(rules, LEGS)


def degrees_between(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """The angle between vectors (..., 3), in degrees (...)."""
    cosine = (a * b).sum(-1) / np.linalg.norm(a, axis=-1) / np.linalg.norm(b, axis=-1)
    return np.degrees(np.arccos(np.clip(cosine, -1, 1)))


def first_of(rules: dict[str, np.ndarray], names: list[str]) -> np.ndarray:
    """Of rules (N,), in the order of names, the index of the first that holds, (N,)."""
    assert list(rules) == names
    return np.argmax(np.stack(list(rules.values())), 0)


def arms_from_torso(p: Pose) -> tuple[np.ndarray, ...]:
    """Where the arms are, seen from the torso, in metres: six arrays (N, 2), for (left, right).

    How far the hand is up, forward and aside (outward) of the shoulder, how far the elbow is aside
    of it, the hand's distance from its hip, and the hand's height over the pelvis. Aside is counted
    from 0.17 m beside the torso's middle, however wide the shoulders of a body are.
    """
    leftward = np.cross(p.up, p.facing)  # (N, 3) the torso's third axis

    def along(vectors, axis):  # (N, 2, 3), (N, 3) -> (N, 2)
        return (vectors * axis[:, None]).sum(-1)

    hand, middle = p.hands - p.shoulders, p.shoulders.mean(1, keepdims=True)
    from_pelvis = p.hands - p.pelvis[:, None]
    # the two joints show where the hips are, however the pelvis is turned; 0.1 m further, the skin
    hip = p.hips - p.hips.mean(1, keepdims=True)
    hip = hip + 0.1 * hip / np.linalg.norm(hip, axis=-1, keepdims=True)
    return (
        along(hand, p.up),
        along(hand, p.facing),
        along(p.hands - middle, leftward) * SIDES - 0.17,
        along(p.elbows - middle, leftward) * SIDES - 0.17,
        np.linalg.norm(from_pelvis - hip, axis=-1),
        along(from_pelvis, p.up),
    )


def arms_of(p: Pose) -> np.ndarray:
    """What the arms do in N poses, seen from the torso: an index into ARMS, (N,)."""
    up, forward, aside, elbow_aside, from_hip, over_pelvis = arms_from_torso(p)
    over_head = ((p.hands - p.head[:, None]) * p.up[:, None]).sum(-1)
    raised = over_head > 0.10  # above the top of the head, whose radius is 0.09
    level = np.abs(up[:, :1] - up[:, 1:]) < 0.18
    # past the middle of the torso, before the chest and not the face
    across = (aside < -0.215) & (elbow_aside > aside) & (forward > 0.05) & level
    across &= (up > -0.34) & (up < 0.04)
    by_head = np.linalg.norm(p.hands - p.head[:, None], axis=-1) < 0.32
    rules = {
        "raised": raised.all(1),
        "crossed": across.all(1),
        "hips": (from_hip < 0.15).all(1)
        & (elbow_aside > aside).all(1)
        & (over_pelvis > -0.07).all(1),
        "one_raised": raised.any(1) & (up.min(1) < 0.1),
        "sides": (aside > 0.33).all(1) & (np.abs(up) < 0.28).all(1),
        "forward": (forward > 0.30).all(1)
        & (np.abs(up) < 0.22).all(1)
        & (np.abs(aside - 0.08) < 0.25).all(1),
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
    return first_of(rules, ARMS)


def trunk_of(p: Pose) -> np.ndarray:
    """How the torso leans in N poses: an index into TRUNK, (N,)."""
    rules = {
        "upright": p.up[:, Z] > 0.93,
        "lying": p.up[:, Z] < 0.3,
        "forward": p.up[:, X] > 0.36,
        "back": p.up[:, X] < -0.36,
        "sideways": np.ones(len(p.up), bool),
    }
    return first_of(rules, TRUNK)


def label(p: Pose) -> np.ndarray:
    """The labels of N poses, (N, 3): indices into LEGS, ARMS and TRUNK."""
    return np.stack([legs_of(p), arms_of(p), trunk_of(p)], 1)


# --------------------------------------------------------------------------------------------------
# What training never sees

HELD_OUT = [  # legs and arms that are together in no frame and no caption; each alone is in many
    ("kneel heels knees_wide", "raised"),
    ("lotus", "raised"),
    ("splits front_splits straddle", "raised"),
    ("kneel heels", "hips"),
    ("sit sit_long sit_bent straddle front_splits half_splits", "crossed"),
    ("squat knees_bent", "crossed"),
]
NEAR_HELD_OUT = {  # legs that look almost like them go too if low and upright enough: a fall stays
    "raised": "knees_bowed knees_back one_knee half_splits sit slouch awkward fall recline",
    "hips": "knees_wide knees_bowed knees_back awkward fall",
    "crossed": "slouch awkward lotus splits recline",
}


def held_out(p: Pose) -> np.ndarray:
    """Which of N poses are kept from training, (N,): those of HELD_OUT, and what comes near."""
    up, forward, aside, _, from_hip, over_pelvis = arms_from_torso(p)
    over_shoulder = (p.hands - p.shoulders)[..., Z]
    arms = {  # wider than the rules of ARMS, for a margin
        "raised": (np.maximum(up, over_shoulder) > 0.12).all(1),
        "crossed": (aside < -0.14).all(1) & (forward > 0).all(1),
        "hips": (from_hip < 0.20).all(1) & (over_pelvis > -0.12).all(1),
    }
    legs = np.array(LEGS)[legs_of(p)]
    low_and_upright = (p.up[:, Z] > 0.55) & (p.pelvis[:, Z] < 0.6)
    result = np.zeros(len(legs), bool)
    for names, arm in HELD_OUT:
        near = np.isin(legs, NEAR_HELD_OUT[arm].split()) & low_and_upright
        result |= (np.isin(legs, names.split()) | near) & arms[arm]
    return result


# --------------------------------------------------------------------------------------------------
# Sentences, and of which labels they are true

LEG_PHRASES = [  # none of its own for front_splits: hardly any body gets there
    (
        "kneeling|on its knees|kneeling on both knees|kneeling down|on both knees"
        "|kneeling on the floor",
        "kneel heels",
    ),
    ("kneeling upright|kneeling tall|standing on its knees", "kneel"),
    ("kneeling, sitting on its heels|sitting back on its heels|kneeling low", "heels"),
    ("kneeling with its knees wide apart|on its knees, legs spread", "knees_wide"),
    ("kneeling on one knee|on one knee|down on one knee|in a lunge|proposing", "one_knee"),
    (
        "seated down, meditating in the lotus position|meditating|in the lotus position"
        "|sitting cross-legged|doing yoga, in the lotus pose|seated with crossed legs"
        "|sitting and meditating",
        "lotus",
    ),
    (
        "standing up|standing|standing upright|standing straight|standing on both feet|on its feet",
        "stand",
    ),
    (
        "standing up on one leg|standing on one leg|balancing on one leg|on one leg"
        "|with one foot in the air|lifting one leg",
        "one_leg",
    ),
    ("standing with bent knees|bending its knees|half crouching", "knees_bent"),
    ("squatting|crouching|in a squat|squatting low|crouching down", "squat"),
    (
        "practicing gymnastics, doing the side splits|doing the side splits|in the side splits"
        "|doing the splits|doing side splits on the floor",
        "splits",
    ),
    ("sitting with its legs apart|sitting in a straddle|seated with spread legs", "straddle"),
    ("sitting with its legs stretched forward|sitting with straight legs", "sit_long"),
    (
        "sitting with one leg stretched to the side|doing half of the splits"
        "|in the splits with one knee bent",
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
    (
        "with its arms crossed|with arms crossed|with crossed arms|crossing its arms"
        "|with its arms folded|holding both elbows|with its forearms laid on each other",
        "crossed",
    ),
    (
        "with hands on hips|with its hands on its hips|hands on hips|with both hands on the hips"
        "|arms akimbo",
        "hips",
    ),
    (
        "with both arms raised|with arms raised|with its hands up|raising both arms"
        "|with both hands above its head|arms up",
        "raised",
    ),
    ("with one arm raised|raising one hand|waving|with one hand up", "one_raised"),
    ("with its arms out to the sides|with arms spread|in a T-pose|arms outstretched", "sides"),
    ("with its arms stretched forward|reaching forward|with its hands in front", "forward"),
    (
        "with its hands at its head|holding its head|with both hands beside its head"
        "|covering its face",
        "head",
    ),
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
SUBJECTS = ["a humanoid robot"] * 6 + [  # the first is the baseline sentence
    "a robot",
    "the robot",
    "a humanoid",
    "a photo of a humanoid robot",
    "a picture of a robot",
]


def phrase_table(phrases: list[tuple[str, str]], labels: list[str]) -> tuple[list[str], np.ndarray]:
    """All sentences, and whether each is true of each label: bool (sentences, labels).

    Row 0 is silence, which is true of everything.
    """
    sentences, rows = [""], [np.ones(len(labels), bool)]
    for variants, true_of in phrases:
        row = np.isin(labels, true_of.split())
        assert row.sum() == len(true_of.split()), f"a label is unknown: {true_of}"
        for sentence in variants.split("|"):
            sentences.append(sentence)
            rows.append(row)
    return sentences, np.array(rows)


TABLES = [
    phrase_table(LEG_PHRASES, LEGS),
    phrase_table(ARM_PHRASES, ARMS),
    phrase_table(TRUNK_PHRASES, TRUNK),
]
SPOKEN_OF = 0.9, 0.6, 0.15  # how often a caption speaks of legs, arms and trunk


def write_captions(labels: np.ndarray, rng: np.random.Generator) -> tuple[list[str], np.ndarray]:
    """labels (B, 3) -> B sentences, one true of each frame, and what each says, (B, 3).

    What a sentence says are rows of the three TABLES, 0 where it is silent.
    """
    sentences, says = [], np.zeros_like(labels)
    for i, row in enumerate(labels):
        if rng.random() > 0.12:  # else the bare baseline, true of every frame
            for part, chance in enumerate(SPOKEN_OF):
                true = np.flatnonzero(TABLES[part][1][1:, row[part]]) + 1
                if len(true) and rng.random() < chance:
                    says[i, part] = rng.choice(true)
        order = rng.permutation(3) if rng.random() < 0.2 else range(3)
        words = [TABLES[part][0][says[i, part]] for part in order if says[i, part]]
        subject = SUBJECTS[rng.integers(len(SUBJECTS))]
        comma = ", " if rng.random() < 0.5 else " "
        sentences.append(f"{subject} {comma.join(words)}".strip())
    return sentences, says


def truth(labels: np.ndarray, says: np.ndarray) -> np.ndarray:
    """labels (B, 3) of frames, says (C, 3) of sentences -> bool (B, C): is j true of frame i?"""
    parts = [TABLES[part][1][says[:, part]][:, labels[:, part]] for part in range(3)]
    return np.logical_and.reduce(parts).T
