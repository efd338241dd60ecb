"""The socket of a page or a server, and its life from the first request to the last."""

import asyncio
import os
import signal
import socket
import tempfile
from collections.abc import Callable
from contextlib import contextmanager
from typing import Any

from .address import Address

CLOSE_SECONDS = 2  # for open connections, such as that of an open page, after the last image


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
