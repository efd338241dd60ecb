"""The address of a page or a server, its libraries, and its life from the first request to the last."""

import asyncio
import os
import signal
import socket
import tempfile
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from .access import is_loopback

LIBRARIES = {"web": ("gradio", "fastapi", "uvicorn"), "serve": ("fastapi", "uvicorn")}
LEAST_GRADIO = 6
MIN_TOKEN = 16  # characters
VARIABLE = "WANLITE_TOKEN"  # of the environment
HOST, PORT = "127.0.0.1", 8000
CLOSE_SECONDS = 2  # for open connections, such as that of an open page, after the last image


@dataclass(frozen=True)
class Address:
    host: str
    port: int
    token: str | None


def check_libraries(flag: str) -> None:
    """Raise ValueError if the libraries of --web or --serve are not installed. They are not imported."""
    for library in LIBRARIES[flag]:
        try:
            found = version(library)
        except PackageNotFoundError:
            raise ValueError(
                f'--{flag} needs {library}, of the extra "web": pip install ".[web]" in the folder of WanLite, or '
                f"pip install {' '.join(LIBRARIES[flag])}."
            ) from None
        if library == "gradio" and int(found.partition(".")[0]) < LEAST_GRADIO:
            raise ValueError(
                f'--{flag}: gradio is {found}, expected {LEAST_GRADIO} or newer: pip install -U ".[web]".'
            )


def choose_address(host: str | None, port: int | None, token: str | None) -> Address:
    """Return the address with its defaults, the token from the environment; raises ValueError."""
    host, port = HOST if host is None else host, PORT if port is None else port
    token = token if token is not None else os.environ.get(VARIABLE) or None
    if not 0 <= port < 2**16:
        raise ValueError(f"--port is {port}, expected 0 (any free port) to 65535.")
    if token is not None and (len(token) < MIN_TOKEN or not token.isascii() or not token.isprintable()):
        raise ValueError(
            f"the token (--token, or the variable {VARIABLE}) has {len(token)} characters, expected at least "
            f"{MIN_TOKEN} of ASCII. `openssl rand -hex 16` prints one."
        )
    if token is None and not is_loopback(host):
        raise ValueError(
            f"--host {host} can be reached from other machines and needs a token: set the variable {VARIABLE}, or add "
            "--token. `openssl rand -hex 16` prints one."
        )
    return Address(host, port, token)


def open_socket(address: Address) -> socket.socket:
    """Return a listening socket; raises OSError with the flag to change."""
    try:
        family, *_, place = socket.getaddrinfo(address.host, address.port, type=socket.SOCK_STREAM)[0]
        return socket.create_server(place[:2], family=family, backlog=128)
    except (OSError, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise OSError(
            f"--host {address.host} --port {address.port} cannot be used: {reason}. Choose another --port, or 0."
        ) from None


def url_of(listener: socket.socket, host: str) -> str:
    """Return the address to open in a browser."""
    name = f"[{host}]" if ":" in host else host
    return f"http://{name}:{listener.getsockname()[1]}"


@contextmanager
def private_folder():
    """Give the page a folder for its copies of images, deleted at the end."""
    with tempfile.TemporaryDirectory(prefix="wanlite-page-") as folder:
        os.environ["GRADIO_TEMP_DIR"] = folder
        yield


def run_server(app: Any, queue: Any, listener: socket.socket) -> None:
    """Serve until Ctrl-C or SIGTERM, which finish the batch that is being drawn; a second Ctrl-C does not wait."""
    import uvicorn

    class Server(uvicorn.Server):
        async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
            queue.close()
            while queue.is_drawing and not self.force_exit:
                await asyncio.sleep(0.05)
            await super().shutdown(sockets)

    config = uvicorn.Config(
        app,
        log_level="error",
        access_log=False,  # prompts are nobody else's
        server_header=False,
        timeout_graceful_shutdown=CLOSE_SECONDS,
        limit_concurrency=1000,
        ws="none",
        lifespan="on",
    )
    with _ignored_afterwards(signal.SIGINT, signal.SIGTERM):
        Server(config).run([listener])


@contextmanager
def _ignored_afterwards(*signals: signal.Signals):
    """uvicorn raises the signal that stopped it again at the end; the process then ends with exit code 0."""
    nothing: Callable = lambda *_: None  # noqa: E731
    before = {number: signal.signal(number, nothing) for number in signals}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
