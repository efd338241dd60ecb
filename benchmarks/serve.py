"""Send requests from several clients to `run_inference.py --serve`, and print what became of them.

    python benchmarks/serve.py --model outputs/wan_t2i                    # 200 requests from 8 clients: a minute
    python benchmarks/serve.py --model outputs/wan_t2i --requests 24

One request in ten does not fit (size, steps, JSON, model), and one in ten comes from a client that closes its connection
before the answer. The others have 1 to 4 images, in any trained number of steps.

answered  with all images in the size of the request
refused   by a rule, for requests that do not fit: 400 to 415
full      429, with Retry-After
left      clients that closed their connection
lost      every other outcome
memory    resident, in MB, after a tenth, half and all of the requests
wasted    images drawn for 20 clients that left before their images began
"""

import argparse
import base64
import http.client
import io
import json
import re
import socket
import struct
import subprocess
import sys
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from wanlite.training.run_folder import read_run
from wanlite.training.sampling_defaults import sampling_defaults

PATH = "/v1/images/generations"
PROMPTS = ("a small red circle at the left on a white background", "a large blue ring above a green cross")
WRONG: tuple[Any, ...] = (
    {"prompt": ""},
    {"prompt": "a ring", "size": "9x9"},
    {"prompt": "a ring", "steps": 999},
    {"prompt": "a ring", "model": "another"},
    "{",
)
TIMEOUT = 300  # seconds
LEAVING = 20  # clients that leave before their images begin


class Server:
    """The process of a server, its port, and its memory."""

    def __init__(self, model: str, queue_size: int):
        flags = ("--serve", "--port", 0, "--model", model, "--queue_size", queue_size, "--device", "cpu")
        command = [sys.executable, ROOT / "run_inference.py", *flags]
        self.process = subprocess.Popen(
            list(map(str, command)), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        line = self.process.stdout.readline()  # type: ignore[union-attr]
        found = re.search(r"http://[^:]+:(\d+)", line)
        if not found:
            sys.exit(f"serve.py: the server did not start: {self.process.communicate()[1][-500:]}")
        self.port = int(found[1])
        self.usage = psutil.Process(self.process.pid)

    def memory(self) -> float:
        """Return the resident memory in MB."""
        return self.usage.memory_info().rss / 1e6

    def num_drawn(self) -> int:
        """Return the number of images that were drawn since the start."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=TIMEOUT)
        connection.request("GET", "/health")
        with closing(connection):
            return json.load(connection.getresponse())["drawn"]

    def stop(self) -> int:
        """Stop the server as Ctrl-C or a service manager does; returns its exit code."""
        self.process.terminate()
        self.process.communicate(timeout=60)
        return self.process.returncode

    def send(self, body: Any) -> tuple[int, Any, Any]:
        """Send a request; returns its status, headers and answer."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=TIMEOUT)
        text = body if isinstance(body, str) else json.dumps(body)
        try:
            connection.request("POST", PATH, text, {"Content-Type": "application/json"})
            answer = connection.getresponse()
            return answer.status, answer.headers, json.load(answer)
        finally:
            connection.close()

    def leave(self, body: dict, seconds: float) -> None:
        """Send a request, and reset the connection after some seconds, as a killed client's is."""
        text = json.dumps(body).encode()
        head = f"POST {PATH} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
        with socket.create_connection(("127.0.0.1", self.port)) as client:
            client.sendall(f"{head}Content-Length: {len(text)}\r\n\r\n".encode() + text)
            time.sleep(seconds)
            client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


def send_one(server: Server, number: int, size: tuple[int, int], steps: list[int]) -> tuple[str, float, int]:
    """Send the request of a number; returns its outcome, its seconds and its images."""
    chance = np.random.default_rng(number)
    body = {
        "prompt": PROMPTS[chance.integers(len(PROMPTS))],
        "n": int(chance.integers(1, 5)),
        "seed": number,
        "steps": int(chance.choice(steps)),
        "size": f"{size[0]}x{size[1]}",
    }
    start = time.monotonic()
    if number % 10 == 3:
        server.leave(body, chance.random() * 0.2)
        return "left", 0.0, 0
    try:
        status, headers, answer = server.send(WRONG[number // 10 % len(WRONG)] if number % 10 == 7 else body)
    except (OSError, ValueError, http.client.HTTPException):
        return "lost", 0.0, 0
    seconds = time.monotonic() - start
    if status == 200 and are_complete(answer, body, size):
        return "answered", seconds, len(answer["data"])
    if status == 429 and headers["Retry-After"] and answer["error"]["message"]:
        return "full", seconds, 0
    is_refusal = number % 10 == 7 and 400 <= status <= 415 and answer["error"]["message"]
    return "refused" if is_refusal else "lost", seconds, 0


def are_complete(answer: dict, body: dict, size: tuple[int, int]) -> bool:
    """Whether an answer has all images of its request, with its seeds, in its size."""
    images = [Image.open(io.BytesIO(base64.b64decode(each["b64_json"]))) for each in answer["data"]]
    seeds = [each["seed"] for each in answer["data"]]
    return [image.size for image in images] == [size] * body["n"] and seeds == [
        body["seed"] + index for index in range(body["n"])
    ]


def count_wasted(server: Server, steps: int) -> int:
    """Return the number of images that are drawn for clients that leave before their images begin."""
    body = {"prompt": PROMPTS[0], "seed": 0, "n": 10, "steps": steps}
    before = server.num_drawn()
    drawn = threading.Thread(target=server.send, args=(body,))
    drawn.start()
    time.sleep(0.05)
    for _ in range(LEAVING):
        server.leave(body | {"n": 1}, 0.0)
    drawn.join()
    server.send(body | {"n": 1})  # after everything that waits
    return server.num_drawn() - before - 11


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """Send all requests and return the figures."""
    run = read_run(arguments.model)
    defaults = sampling_defaults(run)
    size = (defaults["width"], defaults["height"])
    steps = (run.get("schedule") or {}).get("few_steps") or [defaults["num_inference_steps"]]
    server = Server(arguments.model, arguments.queue_size)
    warm = arguments.requests // 10
    with ThreadPoolExecutor(arguments.clients) as clients:
        send = lambda number: send_one(server, number, size, steps)  # noqa: E731
        found = list(clients.map(send, range(warm)))
        memory, start = [server.memory()], time.monotonic()
        half = (warm + arguments.requests) // 2
        for part in (range(warm, half), range(half, arguments.requests)):
            found += list(clients.map(send, part))
            memory.append(server.memory())
    seconds = time.monotonic() - start
    latencies = sorted(each[1] for each in found if each[0] == "answered")
    outcomes = Counter(outcome for outcome, *_ in found)
    return {
        **{name: outcomes[name] for name in ("answered", "refused", "full", "left", "lost")},
        "images_per_second": sum(images for *_, images in found[warm:]) / seconds,
        "median_seconds": latencies[len(latencies) // 2] if latencies else None,
        "p95_seconds": latencies[int(0.95 * len(latencies))] if latencies else None,
        "memory": [round(each) for each in memory],
        "wasted": count_wasted(server, max(steps)),
        "exit_code": server.stop(),
    }


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="outputs/wan_t2i", help="folder of a saved student")
    parser.add_argument("--requests", type=int, default=200)
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--queue_size", type=int, default=16)
    parser.add_argument("--json", help="file for the figures")
    arguments = parser.parse_args()
    if min(arguments.requests // 10, arguments.clients, arguments.queue_size) < 1:
        parser.error("--requests is at least 10, --clients and --queue_size are at least 1.")
    found = measure(arguments)
    for name, value in found.items():
        print(f"{name:18} {value:.2f}" if isinstance(value, float) else f"{name:18} {value}")
    if arguments.json:
        Path(arguments.json).write_text(json.dumps(found, indent=2))
    sys.exit(found["lost"] > 0 or found["exit_code"] != 0)


if __name__ == "__main__":
    main()
