"""The HTTP interface: /v1/images/generations and /v1/models as the OpenAI API has them, and /health."""

import asyncio
import base64
import sys
import time
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from ..runtime.terminal import one_line
from .access import Guard, error_body, without_folders
from .drawing import Drawn, to_png
from .queue import DrawingQueue, QueueClosed, QueueFull
from .requests import MAX_BODY, Limits, RequestError, read_request

BODY_SECONDS = 30  # for a client to send a body of at most MAX_BODY bytes
CLIENT_LEFT = 499  # nginx's status for a client that closed its connection; nobody receives it


def make_app(queue: DrawingQueue, limits: Limits, token: str | None = None, has_api: bool = True) -> FastAPI:
    """Return the application; without `has_api`, it has /health alone, for a page to be mounted on."""
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)  # their pages load code from the network
    started = int(time.time())

    @app.get("/health")
    def health() -> JSONResponse:
        status = "ok" if queue.is_alive else "stopping"
        counts = {"waiting": len(queue), "max_waiting": queue.max_waiting, "drawn": queue.num_drawn}
        return JSONResponse(
            {"status": status, "model": limits.model} | counts, 200 if queue.is_alive else 503
        )

    if has_api:
        model = {"id": limits.model, "object": "model", "created": started, "owned_by": "wanlite"}

        @app.get("/v1/models")
        def models() -> dict:
            return {"object": "list", "data": [model]}

        @app.post("/v1/images/generations")
        async def generate(request: Request) -> Response:
            return await answer(request, queue, limits)

    app.add_exception_handler(HTTPException, _refuse_route)
    app.add_middleware(Guard, token=token)
    return app


async def answer(request: Request, queue: DrawingQueue, limits: Limits) -> Response:
    """Draw the images of a request and return them, or an error."""
    try:
        jobs = read_request(await read_body(request), limits)
        drawn = await draw_while_connected(request, queue, jobs)
        if drawn is None:
            return Response(status_code=CLIENT_LEFT)
        return JSONResponse(await asyncio.to_thread(describe, drawn))
    except RequestError as error:
        return _error(error.status, str(error), param=error.param, code=error.code)
    except QueueFull as error:
        headers = {"Retry-After": str(error.retry_after)}
        return _error(429, str(error), headers, kind="rate_limit_error", code="queue_full")
    except QueueClosed as error:
        return _error(503, str(error), {"Retry-After": "10"}, kind="server_error", code="stopping")
    except Exception as error:  # of any kind, out of memory too: one line, and the server continues
        message = f"the images could not be drawn: {one_line(str(error) or type(error).__name__, 300)}"
        print(message, file=sys.stderr, flush=True)
        return _error(500, without_folders(message), kind="server_error", code="drawing_failed")


async def read_body(request: Request) -> bytes:
    """Return the body of a JSON request; raises RequestError for a large, slow or otherwise typed one."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().casefold()
    if kind != "application/json":  # what forms of other websites cannot send
        raise RequestError(
            "the Content-Type is not application/json.", code="invalid_content_type", status=415
        )
    body = bytearray()
    try:
        async with asyncio.timeout(BODY_SECONDS):
            async for part in request.stream():
                body += part
                if len(body) > MAX_BODY:
                    raise RequestError(
                        f"the body is larger than {MAX_BODY:,} bytes.", code="body_too_large", status=413
                    )
    except TimeoutError:
        raise RequestError(
            f"the body did not arrive in {BODY_SECONDS} s.", code="body_too_slow", status=408
        ) from None
    return bytes(body)


async def draw_while_connected(request: Request, queue: DrawingQueue, jobs: list) -> list[Drawn] | None:
    """Return the images, or None if the client left; its images that have not begun are then dropped."""
    drawing = asyncio.ensure_future(queue.draw(jobs))
    leaving = asyncio.ensure_future(_wait_until_left(request))
    try:
        await asyncio.wait({drawing, leaving}, return_when=asyncio.FIRST_COMPLETED)
        return await drawing if drawing.done() else None
    finally:
        drawing.cancel()
        leaving.cancel()


async def _wait_until_left(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def describe(drawn: list[Drawn]) -> dict[str, Any]:
    """Return the answer with the images as base64; raises FloatingPointError if one is not finite."""
    if numbers := [number for number, each in enumerate(drawn) if each.image is None]:
        raise FloatingPointError(f"{len(numbers)} of {len(drawn)} images are not finite.")
    warnings = list(dict.fromkeys(text for each in drawn for text in each.warnings))
    data = [
        {"b64_json": base64.b64encode(to_png(each.image, each.info)).decode(), "seed": each.job.seed}
        for each in drawn
        if each.image is not None
    ]
    return {"created": int(time.time()), "data": data} | ({"warnings": warnings} if warnings else {})


def _error(status: int, message: str, headers: dict | None = None, **fields: Any) -> JSONResponse:
    return JSONResponse(error_body(message, **fields), status, headers)


async def _refuse_route(request: Request, error: Any) -> JSONResponse:
    message = f"{request.method} {one_line(request.url.path, 100)}: {error.detail}."
    return _error(error.status_code, message, error.headers, code=str(error.detail).lower().replace(" ", "_"))
