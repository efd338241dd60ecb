"""The address of a page or a server, and the libraries that it needs; torch is not imported."""

import os
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version

from ..generation.settings import Settings
from .access import is_loopback

FLAGS = ("host", "port", "token", "queue_size")  # with --web or --serve
LIBRARIES = {"web": ("gradio", "fastapi", "uvicorn"), "serve": ("fastapi", "uvicorn")}
LEAST_GRADIO = 6
MIN_TOKEN = 16  # characters
VARIABLE = "WANLITE_TOKEN"  # of the environment
HOST, PORT = "127.0.0.1", 8000
QUEUE_SIZE, MAX_QUEUE = 32, 10_000  # images


def check_serving(settings: Settings) -> None:
    """Raise ValueError for flags of --web and --serve without them, a missing library or a wrong address."""
    flags = [flag for flag in ("web", "serve") if getattr(settings, flag)]
    if not flags:
        for name in FLAGS:
            if getattr(settings, name) is not None:
                raise ValueError(f"--{name} is used with --web or --serve only; add one, or leave it out.")
        return
    for flag in flags:
        check_libraries(flag)
    choose_address(settings.host, settings.port, settings.token)
    if settings.queue_size is not None and not 0 < settings.queue_size <= MAX_QUEUE:
        raise ValueError(f"--queue_size is {settings.queue_size}, expected 1 to {MAX_QUEUE}.")


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
