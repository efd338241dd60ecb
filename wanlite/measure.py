"""Quality of a given way to draw: how faithful its pictures are to their captions, and how varied they are over seeds."""

import time

import numpy as np

from . import shapes


def prompt_accuracy(draw, captions):
    """Judge pictures drawn for captions of the tiny world: shares 0..1, whole and per attribute, and one and two objects apart.

    `draw(captions)` returns pictures (B, 64, 64, 3) uint8.
    """
    began = time.perf_counter()
    pictures = draw(captions)
    seconds = (time.perf_counter() - began) / len(captions)
    scenes = [shapes.read_caption(caption) for caption in captions]
    verdicts = [shapes.judge(picture, scene) for picture, scene in zip(pictures, scenes)]
    counts = np.array([len(scene.objects) for scene in scenes])
    whole = np.array([verdict["whole"] for verdict in verdicts])
    figures = {"accuracy": whole.mean(), "accuracy_one": whole[counts == 1].mean() if (counts == 1).any() else None,
               "accuracy_two": whole[counts == 2].mean() if (counts == 2).any() else None, "seconds": seconds}
    figures |= {name: np.mean([verdict[name] for verdict in verdicts]) for name in shapes.ATTRIBUTES}
    return {name: None if value is None else round(float(value), 4) for name, value in figures.items()}


def compare(draw_teacher, draw_student, captions):
    """Judge teacher and student on the same captions; nothing where they are not of the tiny world."""
    if not all(shapes.read_caption(caption) for caption in captions):
        return {}
    teacher, student = prompt_accuracy(draw_teacher, captions), prompt_accuracy(draw_student, captions)
    return {"captions": len(captions), "prompt_accuracy": {"teacher": teacher["accuracy"], "student": student["accuracy"]},
            "teacher": teacher, "student": student}


def variety(pictures_by_seed):
    """Return the mean distance between pictures of one caption over seeds, in grey levels 0..255, averaged over captions.

    Shape: (captions, seeds, 64, 64, 3). Compare with the teacher's: a collapsed student draws one picture for all seeds.
    """
    pictures = pictures_by_seed.astype(np.float32)
    seeds = pictures.shape[1]
    pairs = [(i, j) for i in range(seeds) for j in range(i)]
    return float(np.mean([np.abs(pictures[:, i] - pictures[:, j]).mean() for i, j in pairs]))
