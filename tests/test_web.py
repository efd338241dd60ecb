"""run_inference.py --web and --serve as a process, with a student, and the page in a headless browser."""

import base64
import http.client
import io
import json
import re
import shutil
import signal
import socket
import subprocess
import sys
from contextlib import closing
from importlib.util import find_spec

import pytest
from PIL import Image

from tests.conftest import ROOT, run_script
from tests.test_command_lines import read_refusal
from tests.test_report import BROWSERS

GENERATE = ROOT / "run_inference.py"
LIBRARIES = ("gradio", "fastapi", "uvicorn")
PROMPT = 'a <b>red</b> ring & "two" _blue_ crosses'
SECONDS = 60  # for the browser


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--port", "8000"], "--port is used with --web or --serve only"),
        (["--token", "0123456789abcdef"], "--token is used with --web or --serve only"),
    ],
)
def test_flags_of_a_server_without_one_are_refused(arguments, words, finished_run):
    assert words in read_refusal(GENERATE, "--model", finished_run[0], *arguments)


def test_a_missing_library_is_one_line_before_torch(finished_run):
    code = f"""import importlib.metadata, runpy, sys
def version(name):
    raise importlib.metadata.PackageNotFoundError(name)
importlib.metadata.version = version
sys.argv = ["run_inference.py", "--model", "{finished_run[0]}", "--web"]
try: runpy.run_path("{GENERATE}", run_name="__main__")
finally: assert not {{"torch", "gradio", "numpy"}} & set(sys.modules)"""
    process = run_script("-c", code)
    assert process.returncode == 2 and len(process.stderr.splitlines()) == 1, process.stderr
    assert '--web needs gradio, of the extra "web": pip install' in process.stderr


@pytest.fixture(scope="module")
def needs_libraries():
    if missing := [name for name in LIBRARIES if find_spec(name) is None]:
        pytest.skip(f"needs {', '.join(missing)}: pip install '.[web]'")


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--host", "192.168.1.9"], "needs a token: set the variable WANLITE_TOKEN"),
        (["--port", "70000"], "--port is 70000"),
        (["--queue_size", "0"], "--queue_size is 0"),
    ],
)
def test_an_address_that_cannot_be_served_is_refused(arguments, words, finished_run, needs_libraries):
    assert words in read_refusal(GENERATE, "--model", finished_run[0], "--serve", *arguments)


@pytest.fixture(scope="module")
def server(finished_run, tmp_path_factory, needs_libraries):
    """The address and the output folder of a process that serves a page and an API; it ends without an error."""
    folder = tmp_path_factory.mktemp("served")
    flags = ("--web", "--serve", "--port", "0", "--output_dir", folder / "images", "--prompt", "a ring")
    with open(folder / "errors", "w+") as errors:
        process = subprocess.Popen(
            [sys.executable, GENERATE, "--model", finished_run[0], *flags],
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
        )
        lines = [process.stdout.readline() for _ in range(3)]
        assert lines[0].startswith("page "), (folder / "errors").read_text()
        yield re.search(r"http://\S+:\d+", lines[0])[0], folder / "images"
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 0
    assert "Traceback" not in (folder / "errors").read_text()


def request(url, **body):
    """Send a request to the API; returns its answer."""
    connection = http.client.HTTPConnection(url.removeprefix("http://"), timeout=60)
    headers = {"Content-Type": "application/json"}
    connection.request("POST", "/v1/images/generations", json.dumps(body), headers)
    with closing(connection):
        return json.load(connection.getresponse())


def test_the_api_draws_what_the_command_draws(server, finished_run, tmp_path):
    answer = request(server[0], prompt="a red ring", seed=3, steps=2)
    run_script(
        *(GENERATE, "--model", finished_run[0], "--prompt", "a red ring", "--seed", "3"),
        *("--num_inference_steps", "2", "--output_dir", tmp_path),
    )
    served = Image.open(io.BytesIO(base64.b64decode(answer["data"][0]["b64_json"])))
    (written,) = map(Image.open, tmp_path.glob("*.png"))
    assert served.tobytes() == written.tobytes() and served.info == written.info


def test_a_client_that_hangs_up_does_not_stop_the_server(server):
    host, port = server[0].removeprefix("http://").split(":")
    body = json.dumps({"prompt": "a ring", "n": 10}).encode()
    head = (
        f"POST /v1/images/generations HTTP/1.1\r\nHost: {host}:{port}\r\nContent-Type: application/json\r\n"
    )
    for length in (len(body), len(body) + 5):  # the second sends no complete body
        with socket.create_connection((host, int(port))) as client:
            client.sendall(f"{head}Content-Length: {length}\r\n\r\n".encode() + body)
    assert len(request(server[0], prompt="a ring")["data"]) == 1


@pytest.fixture(scope="module")
def browser(server):
    """A page of a headless browser at the address of the server, with the requests that it makes."""
    playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright to control a browser")
    path = next(filter(None, map(shutil.which, BROWSERS)), None)
    if path is None:
        pytest.skip(f"needs one of {', '.join(BROWSERS)}")
    with playwright.sync_playwright() as started:
        opened = started.chromium.launch(executable_path=path, args=["--no-sandbox", "--disable-gpu"])
        tab = opened.new_page(viewport={"width": 1280, "height": 900})
        tab.set_default_timeout(1000 * SECONDS)
        tab.requested, tab.errors = [], []
        tab.on("request", lambda each: tab.requested.append(each.url))
        tab.on("pageerror", lambda each: tab.errors.append(str(each)))
        tab.goto(server[0])
        tab.wait_for_selector("#draw")
        yield tab
        opened.close()


def draw(tab, count, **texts):
    """Fill fields of the page, draw, and return the message and the number of images that are shown."""
    for name, text in texts.items():
        field = f"#{name} textarea" if name == "prompt" else f"#{name} input"
        tab.fill(field, text)
        tab.press(field, "Tab")
    tab.evaluate("document.querySelectorAll('#message p').forEach(each => each.classList.add('old'))")
    tab.click("#draw")
    tab.wait_for_selector("#message p:not(.old)")
    tab.wait_for_function(f"document.querySelectorAll('#images img').length >= {count}")
    return tab.inner_text("#message"), tab.locator("#images .grid-container img").count()


def test_the_page_draws_and_saves_images_with_their_settings(browser, server):
    assert browser.input_value("#prompt textarea") == "a ring"
    browser.fill("#count input[type=number]", "4")
    browser.press("#count input[type=number]", "Tab")
    text, shown = draw(browser, 4, prompt=PROMPT, seed="12")
    assert "Saved 4 images in" in text and shown == 4
    files = sorted(server[1].glob("*.png"))
    assert [Image.open(path).info["seed"] for path in files] == ["12", "13", "14", "15"]
    assert {Image.open(path).info["prompt"] for path in files} == {PROMPT}
    assert browser.locator("#images img").first.evaluate("image => image.naturalWidth") == 64


@pytest.mark.parametrize("width", [360, 1280])
def test_every_image_is_inside_the_gallery_without_scrolling(width, browser):
    browser.set_viewport_size({"width": width, "height": 800})
    browser.fill("#count input[type=number]", "10")
    browser.press("#count input[type=number]", "Tab")
    assert draw(browser, 10, prompt="a ring", seed="1")[1] == 10
    code = """images => { const edge = document.querySelector("#images").getBoundingClientRect();
    return images.map(image => image.getBoundingClientRect())
        .filter(box => box.right > edge.right || box.bottom > edge.bottom || box.width < 40).length }"""
    assert browser.locator("#images .grid-container img").evaluate_all(code) == 0
    browser.set_viewport_size({"width": 1280, "height": 900})


def test_a_dropped_png_fills_the_fields(browser, server):
    draw(browser, 1, prompt="something else", seed="9")
    path = sorted(server[1].glob("*seed14.png"))[0]
    browser.set_input_files("#dropped input[type=file]", path)
    browser.wait_for_function("document.querySelector('#seed input').value == '14'")
    assert browser.input_value("#prompt textarea") == PROMPT
    assert "settings of the image are in the fields" in browser.inner_text("#message")
    assert browser.input_value("#count input[type=number]") == "1"


def test_warnings_and_refusals_are_shown_on_the_page(browser):
    text, shown = draw(browser, 1, prompt="a ring", size="96 x 64")
    assert "trained at 64 x 64; images of 96 x 64 may fail" in text and shown == 1
    assert "WIDTHxHEIGHT" in draw(browser, 1, size="large")[0]
    assert 'Seed is "x<script>", expected' in draw(browser, 1, size="64 x 64", seed="x<script>")[0]
    assert "Prompt is" in draw(browser, 1, prompt=" ", seed="1")[0]
    assert browser.locator("#message script").count() == 0


def test_a_file_without_settings_is_named_on_the_page(browser, tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "plain.png")
    browser.reload()
    browser.wait_for_selector("#draw")
    browser.set_input_files("#dropped input[type=file]", tmp_path / "plain.png")
    browser.wait_for_selector("#message p.error")
    assert "has no settings" in browser.inner_text("#message")


def test_the_page_uses_no_other_address_and_has_no_errors(browser, server):
    assert not [url for url in browser.requested if not url.startswith((server[0], "data:", "blob:"))]
    assert browser.errors == [] and "share" not in browser.inner_text("body").lower()
    overflow = "document.documentElement.scrollWidth - innerWidth"
    assert browser.evaluate(overflow) <= 0
    browser.set_viewport_size({"width": 360, "height": 800})
    assert browser.evaluate(overflow) <= 0


def test_a_load_of_requests_loses_none(finished_run, needs_libraries, tmp_path):
    process = run_script(
        *(ROOT / "benchmarks/serve.py", "--model", finished_run[0], "--requests", "20"),
        *("--clients", "4", "--json", tmp_path / "figures.json"),
    )
    assert process.returncode == 0, process.stderr
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert figures["lost"] == figures["wasted"] == 0 and figures["refused"] == figures["left"] == 2
