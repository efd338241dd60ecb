"""The server without sockets: requests, the queue, access, and the answers of the application."""

import asyncio
import base64
import io
import json
import threading
import time
from importlib.metadata import PackageNotFoundError

import numpy as np
import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from wanlite.serving import address, launch
from wanlite.serving.access import host_name, is_authorized, is_loopback
from wanlite.serving.address import check_libraries, choose_address
from wanlite.serving.drawing import Drawn, flaws
from wanlite.serving.queue import DrawingQueue, QueueClosed, QueueFull
from wanlite.serving.requests import MAX_BODY, Job, Limits, RequestError, make_jobs, read_request

LIMITS = Limits("student", 64, 64, 4, (1, 2, 4), ((64, 64), (96, 64)), 16, 512, 200_000)
KEY = "0123456789abcdef"
JSON = {"content-type": "application/json", "host": "127.0.0.1:8000"}
WAIT = 20  # seconds, of threads


def read(limits=LIMITS, **values):
    return read_request(json.dumps(values).encode(), limits)


# ---- requests ----------------------------------------------------------------------------------------------


def test_a_request_becomes_images_of_consecutive_seeds():
    jobs = read(prompt="a ring", n=3, size="96x64", seed=7, steps=2, model="student", user="me", quality="hd")
    assert jobs == [Job("a ring", seed, 2, 96, 64) for seed in (7, 8, 9)]


def test_unset_fields_are_the_defaults_with_a_seed_of_chance():
    jobs = [read(prompt="a ring", size=size, n=None)[0] for size in ("auto", None)]
    assert {job.shape for job in jobs} == {(4, 64, 64)} and jobs[0].seed != jobs[1].seed


@pytest.mark.parametrize(
    "values, param, words",
    [
        ({}, "prompt", "prompt is null"),
        ({"prompt": " "}, "prompt", "expected a text"),
        ({"prompt": ["a"]}, "prompt", "prompt is a list"),
        ({"prompt": "a" * 10_001}, "prompt", "at most 10,000"),
        ({"prompt": "\ud800"}, "prompt", "not a character"),
        ({"n": 0}, "n", "1 to 10"),
        ({"n": 11}, "n", "1 to 10"),
        ({"n": True}, "n", "n is true"),
        ({"n": 1.0}, "n", "n is 1.0"),
        ({"size": "64"}, "size", "WIDTHxHEIGHT"),
        ({"size": 64}, "size", "size is 64"),
        ({"size": "60x64"}, "size", "the nearest to 60 is 64"),
        ({"size": "0x64"}, "size", "the nearest to 0 is 16"),
        ({"size": "1024x64"}, "size", "at most 512"),
        ({"size": "512x512"}, "size", "memory"),
        ({"size": "128x128"}, "size", "trained sizes: 64x64, 96x64"),
        ({"steps": 3}, "steps", "one of 1, 2, 4"),
        ({"steps": "4"}, "steps", 'steps is "4"'),
        ({"seed": -1}, "seed", "0 to"),
        ({"seed": 2**63}, "seed", "0 to"),
        ({"seed": float("nan")}, "seed", "NaN"),
        ({"response_format": "url"}, "response_format", "b64_json"),
        ({"stream": True}, "stream", "stream is true"),
        ({"guidance": 3}, "guidance", "unknown"),
        ({"model": "dall-e-3"}, "model", "the model is 'student'"),
        ({"model": {}}, "model", "an object"),
    ],
)
def test_a_request_that_does_not_fit_is_refused_with_its_field(values, param, words):
    with pytest.raises(RequestError) as refusal:
        read(**({"prompt": "a ring"} if "prompt" not in values and values else {}) | values)
    assert refusal.value.param == param and words in str(refusal.value) and "\n" not in str(refusal.value)
    assert refusal.value.status == (404 if param == "model" else 400)


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b"1", b"\xff", b"[" * 60_000, b'{"prompt": "a"} x'])
def test_a_body_that_is_not_a_json_object_is_refused(body):
    with pytest.raises(RequestError) as refusal:
        read_request(body, LIMITS)
    assert refusal.value.code == "invalid_json"


def test_the_page_may_draw_an_untrained_size():
    assert make_jobs({"prompt": "a ring", "size": "128 x 128", "seed": 0}, LIMITS)[0].width == 128


# ---- queue -------------------------------------------------------------------------------------------------


class SlowDrawing:
    """Draws a batch when `allowed` is released; the batches are recorded."""

    def __init__(self):
        self.batches, self.begun, self.allowed = [], threading.Semaphore(0), threading.Semaphore(0)

    def __call__(self, jobs):
        self.batches.append(list(jobs))
        self.begun.release()
        assert self.allowed.acquire(timeout=WAIT)
        if jobs[0].prompt == "fail":
            raise MemoryError("no memory")
        return [f"image of {job.seed}" for job in jobs]


def job(seed, width=64, prompt="a ring"):
    return Job(prompt, seed, 4, width, 64)


@pytest.fixture
def slow():
    """A SlowDrawing and its queue, for at most 4 images in a batch and 6 that wait."""
    drawing = SlowDrawing()
    queue = DrawingQueue(drawing, lambda _: 4, 6)
    yield drawing, queue
    drawing.allowed.release(100)
    queue.close()


def begin(slow):
    """Let a batch begin, so that all further images wait."""
    drawing, queue = slow
    (future,) = queue.submit([job(0)])
    assert drawing.begun.acquire(timeout=WAIT)
    return future


def test_waiting_images_of_one_shape_are_drawn_together(slow):
    drawing, queue = slow
    begin(slow)
    futures = [queue.submit([job(seed, width)])[0] for seed, width in enumerate((64, 96, 64, 96, 64), 1)]
    drawing.allowed.release(3)
    assert [future.result(WAIT) for future in futures] == [f"image of {seed}" for seed in range(1, 6)]
    assert [[each.seed for each in batch] for batch in drawing.batches] == [[0], [1, 3, 5], [2, 4]]


def test_a_batch_is_not_larger_than_the_memory_allows(slow):
    drawing, queue = slow
    begin(slow)
    futures = queue.submit([job(seed) for seed in range(1, 7)])
    drawing.allowed.release(3)
    futures[-1].result(WAIT)
    assert [len(batch) for batch in drawing.batches] == [1, 4, 2]


def test_a_full_queue_refuses_and_names_the_seconds_to_wait(slow):
    drawing, queue = slow
    begin(slow)
    queue.submit([job(seed) for seed in range(5)])
    with pytest.raises(QueueFull) as refusal:
        queue.submit([job(5), job(6)])
    assert refusal.value.retry_after >= 1 and len(queue) == 5
    queue.submit([job(5)])  # a smaller request fits


def test_cancelled_images_are_not_drawn_and_leave_room(slow):
    drawing, queue = slow
    begin(slow)
    for future in queue.submit([job(seed) for seed in range(1, 7)]):
        assert future.cancel()
    assert len(queue) == 0
    (kept,) = queue.submit([job(9)])
    drawing.allowed.release(2)
    kept.result(WAIT)
    assert [[each.seed for each in batch] for batch in drawing.batches] == [[0], [9]]


def test_an_image_that_cannot_be_drawn_does_not_stop_the_queue(slow):
    drawing, queue = slow
    first = begin(slow)
    (failing,), (sound,) = queue.submit([job(1, 96, "fail")]), queue.submit([job(2)])
    drawing.allowed.release(3)
    assert first.result(WAIT) and sound.result(WAIT) and isinstance(failing.exception(WAIT), MemoryError)
    assert queue.is_alive


def test_closing_finishes_the_batch_and_refuses_all_others(slow):
    drawing, queue = slow
    first = begin(slow)
    (waiting,) = queue.submit([job(1)])
    queue.close()
    assert isinstance(waiting.exception(WAIT), QueueClosed) and not first.done() and queue.is_drawing
    with pytest.raises(QueueClosed):
        queue.submit([job(2)])
    drawing.allowed.release()
    assert first.result(WAIT) == "image of 0" and not queue.is_alive


# ---- access ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "host, expected",
    [
        ("127.0.0.1", True),
        ("127.9.9.9", True),
        ("localhost", True),
        ("::1", True),
        ("192.168.1.9", False),
        ("::", False),
        ("192.168.0.2", False),
        ("localhost.evil.example", False),
        ("", False),
    ],
)
def test_loopback_addresses_are_recognized(host, expected):
    assert is_loopback(host) is expected


def test_the_name_of_a_host_header_has_no_port():
    assert [host_name(host) for host in ("a:1", "[::1]:80", "", "[")] == ["a", "::1", "", ""]


@pytest.mark.parametrize(
    "value, expected",
    [
        (f"Bearer {KEY}", True),
        (f"bearer  {KEY}", True),
        ("Basic " + base64.b64encode(f"me:{KEY}".encode()).decode(), True),
        (f"Bearer {KEY}0", False),
        (f"Bearer {KEY[:-1]}", False),
        ("Bearer ", False),
        (f"Digest {KEY}", False),
        ("Basic !", False),
        ("Basic " + base64.b64encode(KEY.encode()).decode(), False),
        ("Bearer \u00e9\u00ff", False),
        ("", False),
    ],
)
def test_only_the_whole_token_is_accepted(value, expected):
    assert is_authorized({"authorization": value}, KEY) is expected


@pytest.mark.parametrize(
    "host, port, token, words",
    [
        ("192.168.1.9", None, None, "needs a token"),
        ("192.168.1.5", None, None, "openssl rand"),
        (None, 65536, None, "--port is 65536"),
        (None, -1, None, "--port is -1"),
        ("192.168.1.9", None, "short", "at least 16"),
        ("192.168.1.9", None, "0123456789abcde\u00e9", "ASCII"),
    ],
)
def test_an_address_that_is_not_safe_is_refused(host, port, token, words, monkeypatch):
    monkeypatch.delenv("WANLITE_TOKEN", raising=False)
    with pytest.raises(ValueError, match=words):
        choose_address(host, port, token)


def test_the_token_comes_from_the_environment(monkeypatch):
    monkeypatch.setenv("WANLITE_TOKEN", KEY)
    assert choose_address("192.168.1.9", None, None) == address.Address("192.168.1.9", 8000, KEY)
    monkeypatch.setenv("WANLITE_TOKEN", "")
    assert choose_address(None, 0, None) == address.Address("127.0.0.1", 0, None)


def test_a_missing_library_is_named_with_its_extra(monkeypatch):
    def find(name):
        if name == "gradio":
            raise PackageNotFoundError(name)
        return "1.0"

    monkeypatch.setattr(address, "version", find)
    with pytest.raises(ValueError, match=r'--web needs gradio, of the extra "web": pip install'):
        check_libraries("web")
    check_libraries("serve")
    monkeypatch.setattr(address, "version", lambda _: "5.49.1")
    with pytest.raises(ValueError, match="gradio is 5.49.1, expected 6 or newer"):
        check_libraries("web")


def test_a_port_in_use_is_one_line_with_the_flag():
    with launch.open_socket(address.Address("127.0.0.1", 0, None)) as listener:
        port = listener.getsockname()[1]
        assert launch.url_of(listener, "127.0.0.1") == f"http://127.0.0.1:{port}"
        with pytest.raises(OSError, match="Choose another --port"):
            launch.open_socket(address.Address("127.0.0.1", port, None))


def test_flaws_of_an_image_are_warnings():
    noise = np.random.default_rng(0).integers(0, 255, (8, 8, 3), np.uint8)
    assert flaws(noise) == () and "flat" in flaws(np.zeros_like(noise))[0] and "not finite" in flaws(None)[0]


# ---- the application ---------------------------------------------------------------------------------------


class Drawing:
    """Draws noise of the seed at once."""

    def __call__(self, jobs):
        return [self.draw(each) for each in jobs]

    def draw(self, each):
        random = np.random.default_rng(each.seed)
        info = PngInfo()
        info.add_itxt("seed", str(each.seed))
        image = random.integers(0, 255, (each.height, each.width, 3), np.uint8)
        if each.prompt == "flat":
            image[:] = 0
        return Drawn(each, None if each.prompt == "nan" else image, info, flaws(image))


@pytest.fixture
def make_app():
    """Return a function that makes an application over a drawing function; its queues are closed."""
    server = pytest.importorskip("wanlite.serving.server", reason="needs fastapi", exc_type=ImportError)
    queues = []

    def make(draw=None, token=None, max_waiting=32):
        queues.append(DrawingQueue(draw or Drawing(), lambda _: 8, max_waiting))
        return server.make_app(queues[-1], LIMITS, token), queues[-1]

    yield make
    for queue in queues:
        queue.close()


async def call(app, path="/v1/images/generations", body=None, headers=(), left=None, method=None):
    """Send a request; returns (status, headers, JSON). `left` is an event after which the client is gone."""
    parts = body if isinstance(body, list) else [b"" if body is None else json.dumps(body).encode()]
    messages = [
        {"type": "http.request", "body": part, "more_body": number < len(parts)}
        for number, part in enumerate(parts, 1)
    ]
    sent = []

    async def receive():
        if messages:
            return messages.pop(0)
        await (left or asyncio.Event()).wait()
        return {"type": "http.disconnect"}

    async def send(message):
        sent.append(message)

    scope = {
        "type": "http",
        "asgi": {"version": "3.0"},
        "http_version": "1.1",
        "method": method or ("GET" if body is None else "POST"),
        "path": path,
        "raw_path": path.encode(),
        "root_path": "",
        "scheme": "http",
        "query_string": b"",
        "headers": [
            (name.encode(), value.encode("latin-1")) for name, value in (JSON | dict(headers)).items()
        ],
        "client": ("127.0.0.1", 1),
        "server": ("127.0.0.1", 8000),
    }
    await app(scope, receive, send)
    content = b"".join(message.get("body", b"") for message in sent[1:])
    found = {name.decode(): value.decode() for name, value in sent[0]["headers"]}
    return sent[0]["status"], found, json.loads(content) if content else None


def test_images_are_pngs_with_their_settings(make_app):
    app, _ = make_app()
    status, _, answer = asyncio.run(call(app, body={"prompt": "a ring", "n": 3, "seed": 5, "size": "96x64"}))
    assert (
        status == 200 and [each["seed"] for each in answer["data"]] == [5, 6, 7] and "warnings" not in answer
    )
    images = [Image.open(io.BytesIO(base64.b64decode(each["b64_json"]))) for each in answer["data"]]
    assert all(image.size == (96, 64) for image in images) and images[2].info["seed"] == "7"
    assert abs(answer["created"] - time.time()) < 60


def test_the_model_and_the_health_are_reported(make_app):
    app, queue = make_app()
    assert asyncio.run(call(app, "/v1/models"))[2]["data"][0]["id"] == "student"
    assert asyncio.run(call(app, "/health"))[::2] == (
        200,
        {"status": "ok", "model": "student", "waiting": 0, "max_waiting": 32, "drawn": 0},
    )
    queue.close()
    assert asyncio.run(call(app, "/health"))[0] == 503
    status, headers, answer = asyncio.run(call(app, body={"prompt": "a ring"}))
    assert status == 503 and headers["retry-after"] and answer["error"]["code"] == "stopping"


def test_an_error_names_no_folder_of_the_machine(make_app, capsys):
    def draw(jobs):
        raise OSError(
            "/home/someone/models/student/tokenizer: and/or 1/2, see '/srv/a/b.json'. Copy it again."
        )

    app, _ = make_app(draw)
    status, _, answer = asyncio.run(call(app, body={"prompt": "a"}))
    expected = "the images could not be drawn: tokenizer: and/or 1/2, see 'b.json'. Copy it again."
    assert status == 500 and answer["error"]["message"] == expected
    assert "/home/someone/models/student/tokenizer: and/or" in capsys.readouterr().err


@pytest.mark.parametrize(
    "request_, status, code",
    [
        ({"body": {"prompt": "a", "size": "9x9"}}, 400, "invalid_value"),
        ({"body": {"prompt": "a", "model": "x"}}, 404, "model_not_found"),
        ({"body": [b"{"]}, 400, "invalid_json"),
        ({"body": [b" " * 40_000] * 2}, 413, "body_too_large"),
        ({"body": {"prompt": "a"}, "headers": {"content-type": "text/plain"}}, 415, "invalid_content_type"),
        ({"path": "/v1/chat/completions", "body": {}}, 404, "not_found"),
        ({"method": "PUT", "body": {}}, 405, "method_not_allowed"),
        ({"body": {"prompt": "a"}, "headers": {"host": "evil.example"}}, 403, "forbidden_host"),
        ({"body": {"prompt": "a"}, "headers": {"origin": "http://evil.example"}}, 403, "forbidden_origin"),
        ({"body": {"prompt": "a"}, "headers": {"origin": "null"}}, 403, "forbidden_origin"),
        ({"body": {"prompt": "a"}, "headers": {"origin": "http://[::1"}}, 403, "forbidden_origin"),
        ({"body": {"prompt": "nan"}}, 500, "drawing_failed"),
    ],
)
def test_refusals_have_the_shape_of_the_openai_api(request_, status, code, make_app):
    app, _ = make_app()
    found, _, answer = asyncio.run(call(app, **request_))
    assert found == status and answer["error"]["code"] == code and answer["error"]["message"]
    assert {*answer["error"]} == {"message", "type", "param", "code"}
    assert asyncio.run(call(app, body={"prompt": "a"}))[0] == 200
    assert MAX_BODY < 80_000


def test_a_flat_image_comes_with_a_warning(make_app):
    _, _, answer = asyncio.run(call(make_app()[0], body={"prompt": "flat", "n": 2}))
    assert len(answer["data"]) == 2 and len(answer["warnings"]) == 1 and "flat" in answer["warnings"][0]


def test_a_token_is_required_for_everything_but_the_health(make_app):
    app, _ = make_app(token=KEY)
    body, other = {"prompt": "a"}, {"host": "drawing.example"}
    for headers in ({}, {"authorization": "Bearer wrong"}, {"authorization": f"Bearer {KEY}x"}):
        status, found, answer = asyncio.run(call(app, body=body, headers=headers))
        assert status == 401 and found["www-authenticate"].startswith("Basic")
        assert KEY not in json.dumps(answer)
    allowed = other | {"authorization": f"Bearer {KEY}"}
    assert asyncio.run(call(app, body=body, headers=allowed))[0] == 200
    assert asyncio.run(call(app, "/health"))[0] == 200 and asyncio.run(call(app, "/v1/models"))[0] == 401


def test_a_full_queue_is_answered_with_a_time_to_retry(make_app):
    drawing = SlowDrawing()
    app, queue = make_app(drawing, max_waiting=2)
    queue.submit([job(0)])
    assert drawing.begun.acquire(timeout=WAIT)
    queue.submit([job(1), job(2)])
    status, headers, answer = asyncio.run(call(app, body={"prompt": "a"}))
    assert status == 429 and int(headers["retry-after"]) >= 1 and answer["error"]["code"] == "queue_full"
    drawing.allowed.release(9)


def test_a_client_that_leaves_costs_nothing(make_app):
    drawing = SlowDrawing()
    app, queue = make_app(drawing)
    queue.submit([job(0)])
    assert drawing.begun.acquire(timeout=WAIT)

    async def leave():
        left = asyncio.Event()
        calls = [asyncio.create_task(call(app, body={"prompt": "a", "n": 4}, left=left)) for _ in range(4)]
        while len(queue) < 16:
            await asyncio.sleep(0.01)
        left.set()
        return [status for status, *_ in await asyncio.gather(*calls)]

    assert asyncio.run(leave()) == [499] * 4 and len(queue) == 0
    drawing.allowed.release(9)
    queue.submit([job(1)])[0].exception(WAIT)
    assert [len(batch) for batch in drawing.batches] == [1, 1]


def test_eight_clients_get_their_own_images(make_app):
    app, _ = make_app()

    async def client(number):
        answers = []
        for index in range(4):
            seed = 100 * number + 10 * index
            size = "96x64" if (number + index) % 2 else "64x64"
            answers.append((seed, await call(app, body={"prompt": "a", "n": 2, "seed": seed, "size": size})))
        return answers

    async def all_clients():
        return await asyncio.gather(*map(client, range(8)))

    for answers in asyncio.run(all_clients()):
        for seed, (status, _, answer) in answers:
            assert status == 200 and [each["seed"] for each in answer["data"]] == [seed, seed + 1]
            png = Image.open(io.BytesIO(base64.b64decode(answer["data"][1]["b64_json"])))
            assert png.info["seed"] == str(seed + 1)
