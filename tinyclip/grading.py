"""How nearly a sentence is true of a pose, from 0 to 1, where captions.py says yes or no.

Of what a sentence says of the legs or of the arms, half is whether it is true, and half is how near
the pose is to the nearest one of which it is true:

    1 - distance / reach    at least 0; the distance of places and axes (leg_vectors, arm_vectors)

The name of an upright pose is less true if the torso leans: times 1 when upright, times 1 - LEAN
at 60 degrees and more. What a sentence says of the trunk is true or not.

Of a whole sentence, half is the mean of its parts, and half their product. The mean pays for one
half of "kneeling, with both arms raised" while the other is missing; the product wants both. A
reward that is learned from this has a slope where yes and no alone would have a plateau.
"""

import numpy as np
import torch
from tinyclip.captions import TABLES, UPRIGHT_LEGS
from vlmrm import Pose

LEG_REACH, ARM_REACH = 2.0, 0.8  # distances at which a pose is not near at all
NEARNESS = 0.5  # its share in what a sentence says of one part; the rest is yes or no
LEAN = 0.5  # of the truth of an upright pose's name, the share that a lean of 60 degrees takes
PRODUCT = 0.5  # its share in a whole sentence; the rest is the mean
BANK = 300  # poses of each label, and as many mirror images, among which the nearest is sought


def leg_vectors(p: Pose) -> np.ndarray:
    """What is compared of the legs and the trunk of N poses, (N, 21)."""
    legs = np.concatenate([p.knees - p.hips, p.feet - p.hips], 1).reshape(len(p.up), 12)
    heights = [p.pelvis[:, 2:], p.knees[..., 2], p.feet[..., 2]]
    return np.concatenate([p.up, 0.5 * p.facing[:, 2:], legs, *heights], 1).astype(np.float32)


def arm_vectors(p: Pose) -> np.ndarray:
    """Elbows and hands of N poses, from the shoulders and along the torso's own axes, (N, 12)."""
    axes = np.stack([p.facing, np.cross(p.up, p.facing), p.up], 1)  # (N, 3 axes, 3)
    places = np.concatenate([p.elbows - p.shoulders, p.hands - p.shoulders], 1)  # (N, 4, 3)
    return np.einsum("nax,nkx->nka", axes, places).reshape(-1, 12).astype(np.float32)


def mirrored(p: Pose) -> Pose:
    """The mirror images of N poses: left is right."""
    flip = np.array([1, -1, 1])
    return Pose(*((x[:, ::-1] if x.ndim == 3 else x) * flip for x in p))


def nearness(
    vectors: np.ndarray, images: np.ndarray, labels: np.ndarray, count: int, reach: float
) -> np.ndarray:
    """How near N poses are to each of `count` labels, (N, count), from 0 to 1.

    vectors (N, D) of the poses, `images` of their mirror images; labels (N,).
    """
    rng, all_vectors = np.random.default_rng(0), torch.from_numpy(vectors)
    result = np.zeros((len(vectors), count), np.float32)
    for k in range(count):
        rows = np.flatnonzero(labels == k)
        if not len(rows):
            continue
        rows = rng.choice(rows, min(BANK, len(rows)), replace=False)
        bank = torch.from_numpy(np.concatenate([vectors[rows], images[rows]]))
        for i in range(0, len(vectors), 8192):
            distance = torch.cdist(all_vectors[i : i + 8192], bank).min(1).values.numpy()
            result[i : i + 8192, k] = np.clip(1 - distance / reach, 0, 1)
        result[labels == k, k] = 1
    return result


def grade_phrases(p: Pose, labels: np.ndarray) -> list[np.ndarray]:
    """How true the phrases of each of the three TABLES are of N poses: (N, phrases) each."""
    images = mirrored(p)
    kinds = [(leg_vectors, LEG_REACH), (arm_vectors, ARM_REACH), (None, 0)]
    grades = []
    for part, ((vectors, reach), (_, true_of)) in enumerate(zip(kinds, TABLES)):
        true = true_of[:, labels[:, part]].T.astype(np.float32)  # (N, phrases)
        if vectors is not None:
            count = true_of.shape[1]
            near = nearness(vectors(p), vectors(images), labels[:, part], count, reach)
            nearest = [near[:, row].max(1) for row in true_of]  # of the labels that a phrase is for
            true = (1 - NEARNESS) * true + NEARNESS * np.stack(nearest, 1)
        if part == 0:
            lean = np.degrees(np.arccos(np.clip(p.up[:, 2], -1, 1)))
            for k in range(1, len(true_of)):
                if true_of[k][UPRIGHT_LEGS].sum() == true_of[k].sum():
                    true[:, k] *= 1 - LEAN * np.clip(lean / 60, 0, 1)
        grades.append(true)
    return grades


def graded_truth(grades: list[np.ndarray], rows: np.ndarray, says: np.ndarray) -> np.ndarray:
    """How true C sentences are of B frames, float32 (B, C): 1 where a sentence says nothing.

    grades: of grade_phrases; rows (B,) of the frames; says (C, 3), as of write_captions.
    """
    parts = np.stack([grade[rows][:, says[:, k]] for k, grade in enumerate(grades)])  # (3, B, C)
    spoken = (says > 0).T[:, None]  # (3, 1, C)
    number = spoken.sum(0)
    mean = np.where(number, (parts * spoken).sum(0) / np.maximum(number, 1), 1)
    product = np.where(spoken, parts, 1).prod(0)
    return ((1 - PRODUCT) * mean + PRODUCT * product).astype(np.float32)
