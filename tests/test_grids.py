"""Grids of a run's images: prompts, labels, gutters and enlarged cells, and the facts in the PNG."""

import json

import numpy as np
import pytest
from PIL import Image

from wanlite.data.grids import (
    CELL,
    FRAME,
    GUTTER,
    LABEL_WIDTH,
    MAX_CELLS,
    MAX_COLUMNS,
    MAX_LINES,
    Grid,
    enlarge,
    locate,
    save_grid,
    wrap,
)

BLACK = (0, 0, 0)


def make_grid(num_prompts, num_rows=2, size=(64, 64), prompt="a red ring"):
    """Return a grid of black images, whose prompts are numbered."""
    images = np.zeros((num_prompts, *size, 3), np.uint8)
    prompts = [f"{number} {prompt}" for number in range(num_prompts)]
    return Grid({f"row {number}": images for number in range(num_rows)}, prompts, range(num_prompts))


def black_runs(line):
    """Return the lengths of the runs of black pixels in a line (N, 3)."""
    is_black = np.concatenate([[0], (line == 0).all(-1).astype(int), [0]])
    edges = np.flatnonzero(np.diff(is_black))
    return list(edges[1::2] - edges[::2])


def test_small_cells_are_enlarged_and_separated_by_gutters(tmp_path):
    image = save_grid(tmp_path / "grid.png", make_grid(3), 7)
    assert black_runs(image[10, LABEL_WIDTH:]) == [256, 256, 256]
    assert black_runs(image[: 2 * (256 + GUTTER), LABEL_WIDTH]) == [256, 256]
    assert image.shape[1] == LABEL_WIDTH + 3 * (256 + GUTTER)
    gutter = image[
        10, LABEL_WIDTH + 256 : LABEL_WIDTH + 256 + GUTTER, 0
    ]  # a line around each image, white between
    assert gutter.tolist() == [FRAME[0], 255, 255, FRAME[0]]
    assert (np.asarray(Image.open(tmp_path / "grid.png")) == image).all()


@pytest.mark.parametrize(
    "size, side", [((64, 64), 256), ((96, 64), 288), ((256, 128), 256), ((300, 20), 300)]
)
def test_images_are_enlarged_by_a_whole_factor_without_new_colours(size, side):
    image = np.random.default_rng(0).integers(0, 256, (*size, 3), np.uint8)
    enlarged = enlarge(image)
    factor = side // max(size)
    assert max(enlarged.shape[:2]) == side >= CELL
    assert (enlarged[::factor, ::factor] == image).all() and (
        enlarged[factor - 1 :: factor, ::factor] == image
    ).all()


def test_prompts_are_below_the_columns_and_labels_beside_the_rows(tmp_path):
    image = save_grid(tmp_path / "grid.png", make_grid(2), 0)
    below, beside = image[locate(2, 0, (256, 256))[1] :], image[:256, : LABEL_WIDTH - 1]
    for column in (0, 1):
        left = LABEL_WIDTH + column * (256 + GUTTER)
        assert (below[:, left : left + 256] < 128).any()
    assert (
        (below[:, :LABEL_WIDTH] == 255).all() and (beside[100:156] < 128).any() and (beside[:80] == 255).all()
    )


def test_unused_cells_are_white_and_a_grid_has_at_most_64(tmp_path):
    image = save_grid(tmp_path / "grid.png", make_grid(MAX_COLUMNS + 1, prompt=""), 0)
    last_row = image[-2 * (256 + GUTTER) :][10]
    assert black_runs(last_row[LABEL_WIDTH:]) == [256] and (last_row[LABEL_WIDTH + 257 :] == 255).all()
    save_grid(tmp_path / "large.png", make_grid(300, num_rows=4, size=(8, 8)), 0)
    assert len(json.loads(Image.open(tmp_path / "large.png").text["prompts"])) == MAX_CELLS // 4


def test_a_grid_has_its_prompts_seeds_and_step_as_text(tmp_path):
    save_grid(tmp_path / "grid.png", make_grid(2, size=(48, 64), prompt="\ud800 \0\n猫 <b>"), 120)
    found = {name: json.loads(text) for name, text in Image.open(tmp_path / "grid.png").text.items()}
    assert found == {
        "prompts": ["0 \ud800 \0\n猫 <b>", "1 \ud800 \0\n猫 <b>"],
        "seeds": [0, 1],
        "step": 120,
        "rows": ["row 0", "row 1"],
        "size": [64, 48],
    }


@pytest.mark.parametrize("text", ["a cat " * 1000, "x" * 1000, "\x1b[2J\n\ud800", "", "猫" * 40])
def test_any_prompt_is_wrapped_into_lines_that_fit(text):
    lines = wrap(text, 256)
    assert len(lines) <= MAX_LINES and all(len(line) <= 120 and line.isprintable() for line in lines)
    assert not text or "".join(lines)


def test_twelve_words_fit_below_a_cell_without_being_cut():
    prompt = "a small red ring above a large blue cross on grey background"
    assert " ".join(wrap(prompt, 256)) == prompt and len(wrap(prompt, 256)) <= 3
