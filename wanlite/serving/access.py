"""Who may use a server: addresses, the token, and requests that other websites send through a browser."""

import base64
import binascii
import hmac
import ipaddress
import re
from collections.abc import Mapping
from typing import Any
from urllib.parse import urlsplit

OPEN_PATHS = ("/health",)  # without a token
FOLDERS = re.compile(r"(?<![\w.])/(?:[^\s/:,;'\"]+/)+")  # of an absolute path, without its last part
CHALLENGE = 'Basic realm="WanLite: any name, and the token as password", charset="UTF-8"'


def is_loopback(host: str) -> bool:
    """Whether a host can be reached from its own machine only."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


class Guard:
    """ASGI middleware that refuses requests without the token, and those that other websites make.

    Without a token, only requests whose Host is a loopback address are served: a website whose name resolves to
    127.0.0.1 has another. A token is that of `Authorization: Bearer`, or the password of a browser's login.
    """

    def __init__(self, app: Any, token: str | None):
        self.app, self.token = app, token

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] in ("http", "websocket") and (refusal := self._refuse(scope)):
            return await self._answer(scope, receive, send, *refusal)
        await self.app(scope, receive, send)

    def _refuse(self, scope: Any) -> tuple[int, str, str] | None:
        """Return (status, code, message), or None for a request that is allowed."""
        headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
        host = headers.get("host", "")
        if self.token is None and not is_loopback(host_name(host)):
            return 403, "forbidden_host", "the Host header is not a loopback address."
        origin = headers.get("origin")
        if origin is not None and origin.casefold() not in (
            f"http://{host}".casefold(),
            f"https://{host}".casefold(),
        ):
            return 403, "forbidden_origin", "requests of other websites are refused."
        if self.token is None or scope["path"] in OPEN_PATHS or is_authorized(headers, self.token):
            return None
        return 401, "invalid_api_key", "the token is missing or wrong: send Authorization: Bearer TOKEN."

    async def _answer(self, scope, receive, send, status, code, message):
        from starlette.responses import JSONResponse

        if scope["type"] == "websocket":
            return await send({"type": "websocket.close", "code": 1008, "reason": message})
        headers = {"WWW-Authenticate": CHALLENGE} if status == 401 else {}
        await JSONResponse(error_body(message, code=code), status, headers)(scope, receive, send)


def host_name(host: str) -> str:
    """Return the name of a Host header, without its port."""
    try:
        return urlsplit(f"//{host}").hostname or ""
    except ValueError:
        return ""


def is_authorized(headers: Mapping[str, str], token: str) -> bool:
    """Whether the Authorization header has the token, in a time that does not depend on how much of it matches."""
    scheme, _, credentials = headers.get("authorization", "").partition(" ")
    found = credentials.strip().encode("latin-1", "replace")
    if scheme.casefold() == "basic":
        try:
            found = base64.b64decode(found, validate=True).partition(b":")[2]
        except binascii.Error:
            found = b""
    elif scheme.casefold() != "bearer":
        found = b""
    return hmac.compare_digest(found, token.encode())


def without_folders(text: str) -> str:
    """Return a text with the last part alone of each absolute path: a client learns no folder of this machine."""
    return FOLDERS.sub("", text)


def error_body(
    message: str, kind: str = "invalid_request_error", param: str | None = None, code: str | None = None
) -> dict[str, Any]:
    """Return an error as the OpenAI API has it."""
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}
