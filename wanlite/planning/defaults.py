"""Settings and a teacher -> the content of a run: prompts, images and the student's shape."""

from pathlib import Path

from ..data.grammar import varied_prompts
from ..data.images import choose_images
from ..data.prompts import read_prompts
from ..files.cache import read_record, write_record
from ..files.file_names import RUN
from ..phases import count_steps
from ..student.config import check_shape
from ..student.shape import check_shape_fits, student_shape
from ..training.run_folder import read_run
from ..world.record import read_world

DEFAULT_PROMPTS = 4000  # captions of a tiny world, or generated prompts, without --prompts
MAX_HELD_OUT_SHARE = 20  # at most one prompt in this many is held out
CALIBRATION_TOKENS = 16384  # image tokens on which the projected weights are refitted
MIN_CALIBRATION_FRAMES = 16


def choose_prompts(settings, log=None):
    """Return training prompts and held-out prompts; no training trajectory starts from a held-out one."""
    if settings.prompts is None and (world := read_world(settings.teacher)):
        return _choose_captions(settings, world)
    if settings.prompts is None:
        count = settings.num_trajectories or DEFAULT_PROMPTS
        held_out = varied_prompts(settings.seed, _count_held_out(settings, count), held_out=True)
        return varied_prompts(settings.seed, count), held_out
    num_read = settings.num_trajectories and settings.num_trajectories + settings.num_held_out
    prompts = list(dict.fromkeys(read_prompts(settings.prompts, log, num_read, settings.seed)))
    if len(prompts) == 1:
        if log:
            log("prompts  the only prompt is used for training and for validation")
        return prompts, prompts
    num_held_out = _count_held_out(settings, len(prompts))
    return prompts[:-num_held_out][: settings.num_trajectories], prompts[-num_held_out:]


def _count_held_out(settings, num_prompts):
    return min(settings.num_held_out, max(1, num_prompts // MAX_HELD_OUT_SHARE))


def _choose_captions(settings, world):
    """Return training captions of a tiny world, and held-out ones of one object and of two in turn."""
    training = world.captions(settings.seed, settings.num_trajectories or DEFAULT_PROMPTS)
    count = max(1, settings.num_held_out // 2)
    one, two = (
        world.captions(settings.seed + 1, count, held_out=True, num_objects=number) for number in (1, 2)
    )
    return training, [caption for pair in zip(one, two) for caption in pair]


def choose_data(settings, sizes, log, is_main_process=True):
    """Return training prompts, held-out prompts, and captioned images of `sizes`.

    The captions are among the training prompts. The sizes of decoded images are cached by hash, and only new
    images are decoded; a dry run does not write the cache.
    """
    training, held_out = choose_prompts(settings, log)
    if settings.images is None:
        return training, held_out, []
    path = Path(settings.cache_dir) / "images.json"
    known = read_record(path)
    num_known = len(known)
    images = choose_images(settings.images, sizes, settings.num_images, held_out, log, known, is_main_process)
    if len(known) > num_known and is_main_process and not settings.dry_run:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_record(path, known)
    return list(dict.fromkeys([*training, *(image.caption for image in images)])), held_out, images


def choose_shape(settings, files):
    """Return the student's shape: that of --student, or one from the flags and the teacher's shape.

    Raises ValueError for a student of another teacher, and for a shape that cannot be projected.
    """
    if settings.student is not None:
        run = read_run(settings.student)
        if run["teacher"] != files.fingerprint:
            raise ValueError(
                f"--student {settings.student}: was distilled from another teacher than {settings.teacher}. "
                "Use the same, or leave --student out."
            )
        check_recorded_shape(run["student"], settings.student)
        return run["student"]
    if (settings.feature_directions or 1) > files.width:
        raise ValueError(
            f"--feature_directions {settings.feature_directions} is more than the {files.width} of the "
            "teacher's hidden states. Lower it, or leave it out."
        )
    shape = student_shape(
        files.config, settings.hidden_size, settings.depth, settings.num_heads, settings.ffn_dim
    )
    if settings.projection != "none":
        check_shape_fits(files.config, shape)
    return shape


def check_recorded_shape(shape, folder):
    """Raise ValueError if run.json in a student's folder describes no possible shape."""
    try:
        check_shape(**{"eps": 1e-6} | shape)
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"--student {folder}: its {RUN} has no valid student ({error}). Copy the folder again."
        ) from None


def choose_feature_width(settings, hidden_size):
    """Return the number of principal directions in which hidden states are compared and cached.

    More directions hinder a narrow student, and need more disk.
    """
    return settings.feature_directions or max(1, hidden_size // 4)


def count_calibration_frames(settings, prompts, tokens):
    """Return the number of images of `tokens` tokens on which a student is calibrated."""
    if settings.projection != "calibrated" or settings.student is not None:
        return 0
    return min(len(prompts), max_calibration_frames(tokens))


def max_calibration_frames(tokens):
    """Return the largest number of images of `tokens` tokens on which a student is calibrated."""
    return max(MIN_CALIBRATION_FRAMES, CALIBRATION_TOKENS // tokens)


def describe_schedule(settings, few_steps, phases):
    """Return the schedule for run.json: shift, numbers of sampling steps, and steps trained in each phase."""
    steps = count_steps(phases)
    if settings.student is not None:
        earlier = read_run(settings.student)["schedule"]["phases"]
        steps = {name: earlier.get(name, 0) + count for name, count in steps.items()}
    return {"flow_shift": settings.flow_shift, "few_steps": few_steps or None, "phases": steps}
