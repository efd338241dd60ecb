"""report.html: complete, escaped, self-contained and small, and written again from the files of a run."""

import base64
import json
import re
import shlex
import shutil
import subprocess
from dataclasses import replace
from html.parser import HTMLParser
from io import BytesIO
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from tests.conftest import run_script
from train_distillation import Settings
from wanlite.data.grids import Grid, save_grid
from wanlite.files.atomic import write_json
from wanlite.phases import Span
from wanlite.planning.report_facts import describe_commands, find_changed, resuming_arguments
from wanlite.training.report.charts import (
    MAX_TICKS,
    Chart,
    Curve,
    linear_ticks,
    log_ticks,
    select_points,
    thin,
)
from wanlite.training.report.history import History
from wanlite.training.report.page import MAX_GRIDS, MAX_IMAGE_BYTES, compress, render, write_report
from wanlite.training.run_folder import MetricsLog, read_run
from wanlite.training.run_log import RunLog

HOSTILE = (
    "</title><script>alert('1')</script><img src=http://a.b/c onerror=\"alert(2)\"> & ' \" {{ 7 * 7 }} \ud800"
)
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
VOID = {"meta", "img", "input", "line", "polyline", "circle", "br"}
PHASES = [
    {"name": "velocity", "first": 0, "last": 40, "resolution": 0, "size": [64, 64]},
    {"name": "few_step", "first": 40, "last": 100, "resolution": 0, "size": [64, 64]},
]


def make_run(text="a red ring", **changed):
    """Return the content of run.json at the beginning of a run whose texts are all `text`."""
    return {
        "settings": {"output_dir": text, "max_train_steps": 100, "matching_steps": 0, "prompts": text},
        "versions": {"torch": text},
        "student": {"hidden_size": 64, "depth": 4, "num_heads": 4},
        "student_parameters": 330_880,
        "validation_prompts": [text, "a second prompt"],
        "finished": False,
        "report": {
            "changed": {"prompts": text, text: text, "few_steps": [1, 2]},
            "teacher": {"folder": text, "layout": text, "experts": [1_250_000, 1_250_000]},
            "machine": {"device": text, "threads": 2, "memory": 25e9, "processes": 1},
            "phases": PHASES,
            "counts": {"prompts": 4000, "held_out": 400, "trajectories": 4000, "states_per_step": 128},
            "directory": text,
            "commands": {
                "draw": f"python run_inference.py --model {shlex.quote(text)}",
                "resume": "resume it",
            },
        },
    } | changed


def figures(error, drift=0.02, diversity=0.9):
    """Return the record of a validation of one and two sampling steps."""
    found = {"held_out_error": error / 2}
    for count in (1, 2):
        measures = {"image_error": error + count / 100, "channel_drift": drift, "diversity": diversity}
        measures |= {"saturation": 1.0, "frechet_distance": 0.001}
        found |= {f"{name}_{count}": value for name, value in measures.items()}
    return found


def write_run(folder, run, validations, side=8):
    """Write the files of a run with a record and a grid for each of {step: figures}."""
    folder.mkdir(exist_ok=True)
    write_json(folder / "run.json", run)
    log = MetricsLog(folder / "metrics.jsonl", 0)
    log.write(step=0, generated=4200, trajectories_per_second=66.0)
    for step, record in validations.items():
        log.write(step=step, loss=3 / (step + 1), seconds=step * 2.0, memory_peak_gb=0.7, skipped_steps=0)
        log.write(step=step, **record)
        image = np.full((2, side, side, 3), step % 256, np.uint8)
        grid = Grid({"teacher 4 steps": image, "student 1 step": image}, run["validation_prompts"], [0, 1])
        save_grid(folder / "samples" / f"step-{step:06d}.png", grid, step)
    return folder


@pytest.fixture
def running(tmp_path):
    """An unfinished run: rejected at step 60, accepted at step 80."""
    validations = {20: figures(0.9), 60: figures(0.7, drift=0.5), 80: figures(0.5)}
    return write_run(tmp_path / "run", make_run(), validations)


def finish(folder, **changed):
    ending = {
        "finished": True,
        "steps": 100,
        "minutes": 3.4,
        "chosen": {"step": 80, "image_error": 0.515, "why": "the lowest image_error of the validations"},
    }
    write_json(folder / "run.json", read_run(folder) | ending | changed)


class Page(HTMLParser):
    """Tags, attributes and text of a page; raises AssertionError if its tags are not nested."""

    def __init__(self, html):
        super().__init__()
        self.tags, self.links, self.texts, self.open = [], [], [], []
        self.feed(html)
        assert not self.open

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        self.links += [value for name, value in attributes if name in ("src", "href", "action", "data")]
        assert not [name for name, _ in attributes if name.startswith("on")]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append(data)

    @property
    def text(self):
        return " ".join(" ".join(self.texts).split())

    def find(self, tag):
        return [attributes for name, attributes in self.tags if name == tag]


# ---- content -----------------------------------------------------------------------------------------------


def test_a_running_page_names_the_closest_student_and_the_rejected_one(running):
    text = Page(render(running)).text
    assert "Step 80 of 100; the closest student so far is that of step 80." in text
    assert "Step 60 was rejected, unlike the teacher in 1 step: colour drift 0.50, at most 0.3." in text
    assert "Step 20 was rejected" not in text and "lowest image error so far (0.515)" in text
    assert "resume it" in text and "4,200, 66 a second" in text and "at most 0.7 GB" in text
    assert "1.25 million + 1.25 million parameters" in text and "0.33 million parameters" in text


def test_a_finished_page_has_the_verdict_the_reason_and_rounded_results(running):
    by_steps = {"1": {"accuracy": 0.8712}, "2": {"accuracy": 0.91}}
    results = {"captions": 400, "teacher": {"accuracy": 0.995}, "student_by_steps": by_steps}
    finish(running, results=results)
    text = Page(render(running)).text
    assert "Good: 91.0% of the held-out captions are drawn right in 2 steps, 99.5% by the teacher" in text
    assert "3.4 minutes, 80 steps" in text
    assert "The saved student is that of step 80: the lowest image error of the validations (0.515)." in text
    assert re.search("Captions drawn right 91.0% 87.1% Share of 400 .* teacher reaches 99.5%. Image", text)
    assert "resume it" not in text and "0.8712" not in text


def test_a_run_without_an_accepted_validation_has_a_warning(tmp_path):
    counts = {"prompts": 29, "held_out": 1, "trajectories": 300, "states_per_step": 128}
    run = make_run()
    run["report"]["counts"] = counts
    write_run(tmp_path / "run", run, {100: figures(0.9, diversity=0.1)})
    assert "no validation was accepted so far" in Page(render(tmp_path / "run")).text
    finish(tmp_path / "run", chosen={"step": 100, "why": "the last"})
    MetricsLog(tmp_path / "run/metrics.jsonl", 100).write(step=100, skipped_steps=3)
    page = Page(render(tmp_path / "run"))
    for words in (
        "No validation was accepted. The images may be unlike the teacher's.",
        "3 steps were skipped, because their gradients were not finite.",
        "29 prompts are few.",
        "1 held-out prompts are few",
    ):
        assert words in page.text
    assert "verdict bad" in [attributes.get("class") for attributes in page.find("p")]


def test_no_line_of_a_sentence_ends_inside_a_flag(tmp_path):
    run = make_run()
    run["report"]["counts"] = {"prompts": 29, "held_out": 1, "trajectories": 300, "states_per_step": 128}
    write_run(tmp_path / "run", run, {100: figures(0.9)})
    finish(tmp_path / "run")
    sentences = "".join(re.findall("<(?:p class=.verdict|li).*", render(tmp_path / "run")))
    assert "--" in sentences and sentences.count("--") == sentences.count('<span class="flag">--')


@pytest.mark.parametrize("phase, step, is_candidate", [("few_step", 40, False), ("few_step", 41, True)])
def test_validations_of_the_velocity_phase_are_no_candidates(phase, step, is_candidate):
    history = History(make_run(), [{"step": step, **figures(0.5)}])
    assert history.validations[0].is_candidate == is_candidate and bool(history.kept) == is_candidate
    alone = make_run(report={"phases": PHASES[:1]})
    assert History(alone, [{"step": 20, **figures(0.5)}]).kept.step == 20


@pytest.mark.parametrize("content", [{}, {"finished": True}, {"settings": {}, "report": {}}])
def test_a_run_of_an_older_version_or_without_metrics_has_a_page(content, tmp_path):
    write_json(tmp_path / "run.json", content)
    assert Page(render(tmp_path)).find("h1")
    (tmp_path / "metrics.jsonl").write_text(
        '{"loss": 1}\n{"step": 0, "loss": NaN, "held_out_error": Infinity}\n'
    )
    assert Page(render(tmp_path)).find("h1")


# ---- safety ------------------------------------------------------------------------------------------------


def test_every_text_of_a_run_is_escaped(tmp_path):
    folder = write_run(tmp_path / "a <b> & 'c'", make_run(HOSTILE), {80: figures(0.5)})
    finish(folder, chosen={"step": 80, "why": HOSTILE})
    html = render(folder)
    page = Page(html)
    assert len(page.find("script")) == 1 and len(page.find("title")) == 1 and len(page.find("img")) == 1
    assert "{{ 7 * 7 }}" in page.text and page.text.count("alert('1')") >= 10 and "<b> &" not in html
    write_report(folder)
    assert (folder / "report.html").read_text("utf-8") == html.encode("utf-8", "replace").decode()


def test_a_page_loads_nothing_from_a_network(running):
    page = Page(render(running))
    assert page.links and all(link.startswith("data:image/png;base64,") for link in page.links)
    assert "url(" not in render(running) and "import" not in [tag for tag, _ in page.tags]
    policies = [each["content"] for each in page.find("meta") if "http-equiv" in each]
    assert len(policies) == 1 and policies[0].startswith("default-src 'none'; img-src data:;")


def test_only_the_last_grid_is_shown_without_javascript(running):
    page = Page(render(running))
    grids = [each for each in page.find("figure") if "data-step" in each]
    assert [(each["data-step"], "hidden" in each) for each in grids] == [
        ("20", True),
        ("60", True),
        ("80", False),
    ]
    assert [each for each in page.find("div") if each.get("class") == "steps"] == [
        {"class": "steps", "hidden": None}
    ]


def test_large_grids_are_compressed_and_many_are_thinned(tmp_path):
    validations = {step: figures(0.5) for step in range(61, 101)}
    write_run(tmp_path / "run", make_run(), validations)
    noise = np.random.default_rng(0).integers(0, 256, (400, 400, 3), np.uint8)
    for path in (tmp_path / "run/samples").iterdir():
        Image.fromarray(noise).save(path, compress_level=0)
    write_report(tmp_path / "run")
    html = (tmp_path / "run/report.html").read_text()
    assert len(html) < 1.4 * MAX_IMAGE_BYTES < 10e6
    links = Page(html).links
    assert len(links) == MAX_GRIDS and all(link.startswith("data:image/jpeg;base64,") for link in links)
    shown = Image.open(BytesIO(base64.b64decode(links[-1].partition(",")[2])))
    assert 100 < shown.width <= 400 and '"100"' in html and '"61"' in html
    assert len(compress(Image.fromarray(noise), 1)) < 5_000


def test_a_broken_grid_is_left_out(running):
    for step, content in ((20, b"not an image"), (60, b"\x89PNG\r\n\x1a\n" + bytes(30))):
        (running / f"samples/step-{step:06d}.png").write_bytes(content)
    (running / "samples/mine.png").write_bytes(b"")
    assert len(Page(render(running)).links) == 1


# ---- written again -----------------------------------------------------------------------------------------


def test_a_resumed_run_shows_no_grid_of_a_step_that_it_has_not_reached(running):
    MetricsLog(running / "metrics.jsonl", 60)  # resumed at step 60: the grid of step 80 is still there
    page = Page(render(running))
    assert [each["data-step"] for each in page.find("figure") if "data-step" in each] == ["20", "60"]
    assert "Step 60 of 100; no validation was accepted so far." in page.text


def test_a_page_is_the_same_when_it_is_written_again(running):
    write_report(running)
    first = (running / "report.html").read_text()
    process = run_script("-m", "wanlite.training.report.page", running)
    assert process.returncode == 0, process.stderr
    assert without_time((running / "report.html").read_text()) == without_time(first)
    assert not list(running.glob(".*"))


def without_time(html):
    return re.sub(r"Written [\d: -]+UTC", "", html)


def test_a_full_disk_leaves_the_earlier_page_and_the_run(running, small_disk):
    folder = shutil.copytree(running, small_disk / "run")
    write_report(folder)
    before = (folder / "report.html").read_bytes()
    with pytest.raises(OSError, match="No space left"):
        (small_disk / "ballast").write_bytes(bytes(4_000_000))
    printed = []
    log = SimpleNamespace(folder=folder, accelerator=SimpleNamespace(print=printed.append))
    RunLog.write_report(log)
    assert "WARNING: report.html is not written" in printed[0] and "No space left" in printed[0]
    assert (folder / "report.html").read_bytes() == before and not list(folder.glob(".*"))


def test_a_run_writes_its_page_and_names_it(finished_run):
    folder, printed = finished_run
    page, run = Page((folder / "report.html").read_text()), read_run(folder)
    assert f"report   {folder / 'report.html'}\nnext: " in printed
    assert (
        f"{run['verdict']['word'].capitalize()}: " in page.text and run["validation_prompts"][0] in page.text
    )
    assert run["report"]["changed"]["max_train_steps"] == 6 and "seed" not in run["report"]["changed"]
    assert run["report"]["commands"]["draw"] in page.text and "tensorboard" not in page.text
    steps = [each["data-step"] for each in page.find("figure") if "data-step" in each]
    assert steps == ["0", "3", "6"] and len(page.find("svg")) == 5
    assert sum(path.stat().st_size for path in folder.glob("report.html")) < 2e6


# ---- facts of run.json -------------------------------------------------------------------------------------


def test_changed_settings_are_those_that_differ_from_their_defaults():
    settings = Settings(max_train_steps=200, few_steps=[1, 2, 4], seed=3, flow_shift=3.0, teacher="/wan")
    arguments = ["--max_train_steps", "200", "--seed=3", "--teacher_path", "/wan"]
    assert find_changed(settings, arguments) == {"teacher": "/wan", "max_train_steps": 200, "seed": 3}


@pytest.mark.parametrize(
    "first, further",
    [
        ("velocity", ["--student", "my out/base"]),  # through both phases again
        ("few_step", ["--student", "my out", "--few_step_train_steps", "10"]),
    ],
)
def test_the_commands_of_a_page_are_quoted_and_continue_the_run(first, further):
    settings = Settings(output_dir="my out", max_train_steps=10, overwrite=True, cache_dir="my out/cache")
    run = SimpleNamespace(settings=settings, few_steps=[1], phases=[Span(first, 0, 10, 0)])
    arguments = ["--output_dir", "my out", "--seed", "3", "--cache_dir=my out/cache", "--overwrite"]
    commands = describe_commands(run, arguments)
    assert {name: shlex.split(text)[2:] for name, text in commands.items() if name != "curves"} == {
        "draw": ["--model", "my out"],
        "resume": arguments[:-1],
        "train further": [
            *("--seed", "3", *further[:2], "--output_dir", "my out-further"),
            *("--cache_dir", "my out/cache", *further[2:]),
        ],
    }
    assert commands["curves"] == "tensorboard --logdir 'my out/logs'"


def test_settings_that_would_start_a_run_again_are_left_out_or_reverted_to_resume_it():
    again = Settings(resume_from_checkpoint="none", overwrite=True)
    typed = ["--resume_from_checkpoint", "none", "--seed", "3", "--overwrite"]
    assert resuming_arguments(again, typed) == ["--seed", "3"]
    assert resuming_arguments(again, ["--resume_from_checkpoint=none", *typed[2:]]) == ["--seed", "3"]
    reverted = ["--seed", "3", "--no-overwrite", "--resume_from_checkpoint", "latest"]
    assert resuming_arguments(replace(again, config="a.toml"), ["--seed", "3"]) == reverted
    assert resuming_arguments(Settings(config="a.toml"), ["--seed", "3"]) == ["--seed", "3"]


# ---- charts ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("low, high", [(0.5, 7), (0.001, 900), (0.41, 0.44), (1e-9, 1e9), (3, 3.1)])
def test_ticks_are_few_and_inside_the_axis(low, high):
    for ticks in (log_ticks(low, high), linear_ticks(low, high)):
        assert 1 <= len(ticks) <= MAX_TICKS + 1 and all(low <= tick <= high * 1.0001 for tick in ticks)


@pytest.mark.parametrize("is_log", [False, True])
def test_curves_stay_inside_their_chart_for_any_values(is_log):
    values = [(0, 1.0), (1, float("nan")), (2, float("inf")), (3, None), (4, -1.0), (5, 1e-30), (6, 1e30)]
    points = select_points(values, is_log)
    assert len(points) == (3 if is_log else 4)
    for curves in ([Curve("a", points)], [Curve("a", points[:1])]):
        chart = Chart("t", "n", curves, 6, is_log, {"limit": 0.3}, {"velocity": 6}, kept=6)
        for x, y in chart.lines[0].dots:
            assert chart.left <= x <= chart.right and chart.top <= y <= chart.bottom
        assert chart.y_ticks and chart.x_ticks and chart.kept_at == chart.right


def test_thinned_points_keep_both_ends():
    assert thin(range(1000), 5) == [0, 250, 500, 749, 999] and thin([1, 2], 5) == [1, 2]


# ---- a real browser ----------------------------------------------------------------------------------------

PROBE = """<script>
const state = () => ({shown: grids.filter(grid => !grid.hidden).map(grid => grid.dataset.step), text: shown.value});
const before = state();
slider.value = 0;
slider.dispatchEvent(new Event("input"));
const image = document.querySelector("#grids figure:not([hidden]) img");
image.decode().then(() => {
  const width = document.documentElement.scrollWidth;
  const edges = [...document.querySelectorAll("body > section > h2")].map(title => title.getBoundingClientRect().left);
  const found = {before, after: state(), image: image.naturalWidth, overflow: width - innerWidth, edges};
  document.body.textContent = "FOUND" + JSON.stringify(found) + "END";
  console.log("probe is done");
});
</script></body>"""


def browse(path, *options):
    """Open a file in a headless browser, and return the page's code afterwards and the messages of its console."""
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser is None:
        pytest.skip(f"needs one of {', '.join(BROWSERS)}")
    fixed = ("--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", "--dump-dom")
    profile = f"--user-data-dir={path.parent / 'profile'}"
    process = subprocess.run(
        [browser, *fixed, profile, "--virtual-time-budget=5000", *options, path.as_uri()],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert process.returncode == 0, process.stderr
    return process.stdout, [line for line in process.stderr.splitlines() if "CONSOLE" in line]


@pytest.mark.parametrize("width", [360, 1280])
def test_the_slider_changes_the_grid_in_a_browser(width, tmp_path):
    """The texts of the run are hostile: none is executed, and nothing is loaded."""
    run = make_run(HOSTILE)
    validations = {20: figures(0.9), 60: figures(0.7), 80: figures(0.5)}
    html = render(write_run(tmp_path / "run", run, validations)).encode("utf-8", "replace").decode()
    (tmp_path / "page.html").write_text(html.replace("</body>", PROBE))
    code, messages = browse(tmp_path / "page.html", f"--window-size={width},900")
    found = json.loads(re.search("FOUND(.*)END", code)[1])
    assert found["before"] == {"shown": ["80"], "text": "80"} and found["after"] == {
        "shown": ["20"],
        "text": "20",
    }
    assert found["image"] > 400 and found["overflow"] <= 0 and len(set(found["edges"])) == 1
    assert len(messages) == 1 and "probe is done" in messages[0]
