"""The tiny world: every caption describes its scene, held-out captions stay held out, and the judge is
correct.
"""

import numpy as np
import pytest
from PIL import Image, ImageFilter

from wanlite.world import shapes
from wanlite.world.shapes import Object, Scene

SCENES = shapes.scenes(11, 300) + shapes.scenes(11, 300, held_out=True)


@pytest.fixture(scope="module")
def images():
    random = np.random.default_rng(5)
    return [shapes.draw(scene, random) for scene in SCENES]


def share_read(images):
    return np.mean([shapes.read_image(image) == scene for image, scene in zip(images, SCENES)])


def test_every_caption_of_a_scene_parses_to_it():
    for scene in SCENES:
        assert all(shapes.read_caption(way) == scene for way in shapes.all_captions(scene))
    assert shapes.read_caption("a dog on a beach") is None


def test_training_and_held_out_scenes_are_disjoint_with_one_vocabulary():
    def combinations(held_out):
        return {
            tuple((o.colour, o.shape, o.place) for o in scene.objects)
            for scene in shapes.scenes(0, 4000, held_out)
        }

    assert not combinations(False) & combinations(True)
    for held_out in (False, True):
        text = " ".join(shapes.captions(0, 2000, held_out))
        assert all(
            word in text
            for word in (*shapes.COLOURS, *shapes.SHAPES, *shapes.SIZES, *shapes.PLACES, *shapes.BACKGROUNDS)
        )


def test_scenes_and_captions_are_functions_of_their_seed():
    assert shapes.captions(4, 50) == shapes.captions(4, 50) != shapes.captions(5, 50)


def test_the_judge_reads_clean_drawings(images):
    assert share_read(images) >= 0.995


def test_the_judge_reads_noisy_images(images):
    random = np.random.default_rng(0)
    noisy = [np.clip(p + random.normal(0, 16, p.shape), 0, 255).round().astype(np.uint8) for p in images]
    assert share_read(noisy) >= 0.99


def test_the_judge_reads_blurred_images(images):
    assert (
        share_read([np.array(Image.fromarray(p).filter(ImageFilter.GaussianBlur(1))) for p in images]) >= 0.98
    )


def lose_an_object(image, scene):
    return shapes.draw(Scene(scene.objects[1:], scene.background))


def halve_an_object(image, scene):
    x, y = shapes.PLACES[scene.objects[0].place]
    broken = image.copy()
    broken[y - 16 : y + 16, x : x + 16] = shapes.BACKGROUNDS[scene.background]
    return broken


def add_a_stray_blob(image, scene):
    broken = image.copy()
    broken[1:9, 1:9] = shapes.COLOURS["red"]
    return broken


def swap_red_and_blue(image, scene):
    return image[..., ::-1] if any(o.colour in ("red", "blue") for o in scene.objects) else 255 - image


def grow_an_object(image, scene):
    size = "small" if scene.objects[0].size == "large" else "large"
    first = Object(size, scene.objects[0].colour, scene.objects[0].shape, scene.objects[0].place)
    return shapes.draw(Scene((first, *scene.objects[1:]), scene.background))


def paint_half_the_background(image, scene):
    other = next(rgb for name, rgb in shapes.BACKGROUNDS.items() if name != scene.background)
    broken = image.copy()
    ground = np.abs(image.astype(int) - shapes.BACKGROUNDS[scene.background]).max(-1) < 8
    broken[ground & (np.arange(64) < 24)] = other
    return broken


def move_everything(image, scene):
    return np.roll(image, 11, axis=(0, 1))


def melt_into_a_blob(image, scene):
    return np.array(Image.fromarray(image).filter(ImageFilter.GaussianBlur(7)))


def shuffle_patches(image, scene):
    patches = image.reshape(4, 16, 4, 16, 3).swapaxes(1, 2).reshape(16, 16, 16, 3)
    return np.roll(patches, 1, axis=0).reshape(4, 4, 16, 16, 3).swapaxes(1, 2).reshape(64, 64, 3)


def two_colours_in_one(image, scene):
    x, y = shapes.PLACES[scene.objects[0].place]
    colour = next(rgb for name, rgb in shapes.COLOURS.items() if name != scene.objects[0].colour)
    broken = image.copy()
    thing = np.abs(image.astype(int) - shapes.COLOURS[scene.objects[0].colour]).max(-1) < 8
    thing &= np.arange(64)[None] >= x
    broken[thing] = colour
    return broken


@pytest.mark.parametrize(
    "break_it",
    [
        lose_an_object,
        halve_an_object,
        add_a_stray_blob,
        swap_red_and_blue,
        grow_an_object,
        paint_half_the_background,
        move_everything,
        melt_into_a_blob,
        shuffle_patches,
        two_colours_in_one,
    ],
)
def test_a_broken_image_is_never_read_as_its_scene(break_it, images):
    wrongly = [
        scene for image, scene in zip(images, SCENES) if shapes.read_image(break_it(image, scene)) == scene
    ]
    assert not wrongly, f"{len(wrongly)} of {len(SCENES)}, first {wrongly[0]}"


def test_a_flat_image_and_pure_noise_show_no_scene():
    assert shapes.read_image(np.full((64, 64, 3), 245, np.uint8)) is None
    assert shapes.read_image(np.random.default_rng(0).integers(0, 255, (64, 64, 3)).astype(np.uint8)) is None


def test_the_verdict_names_the_attribute_that_is_wrong():
    scene = Scene(
        (Object("small", "red", "circle", "left"), Object("large", "blue", "ring", "right")), "white"
    )
    wrong = Scene(
        (Object("small", "red", "square", "left"), Object("large", "cyan", "ring", "right")), "white"
    )
    assert shapes.judge(shapes.draw(scene), scene) == dict.fromkeys(("whole", *shapes.ATTRIBUTES), 1.0)
    assert shapes.judge(shapes.draw(wrong), scene) == {
        "whole": 0.0,
        "count": 1.0,
        "background": 1.0,
        "colour": 0.5,
        "shape": 0.5,
        "size": 1.0,
        "place": 1.0,
    }
