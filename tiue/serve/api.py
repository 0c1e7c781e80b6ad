"""The HTTP API, in the form that clients of OpenAI's images know."""

from __future__ import annotations

import asyncio
import base64
import io
import logging
import secrets
import time
from collections.abc import Awaitable
from contextlib import asynccontextmanager
from typing import Annotated, Any, Literal, TypeVar

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, PlainTextResponse
from fastapi_offline import FastAPIOffline
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from pydantic import BaseModel, ConfigDict, Field
from starlette.exceptions import HTTPException
from starlette.middleware.trustedhost import TrustedHostMiddleware

from tiue.errors import InputError
from tiue.serve.batching import ClosedError, QueueFullError
from tiue.serve.bodies import BoundedBodies
from tiue.serve.engine import Drawing, Picture
from tiue.serve.service import Service
from tiue.terminal import MAX_SEED, is_out_of_memory

_log = logging.getLogger(__name__)
_Result = TypeVar("_Result")


class HungUpError(Exception):
    """The client is gone; nobody reads the answer."""


class ImageRequest(BaseModel):
    """Pictures of a prompt. What is not named here is refused."""

    model_config = ConfigDict(extra="forbid", strict=True)

    prompt: str
    model: Annotated[str | None, Field(description="The served model's name, or nothing.")] = None
    n: int = 1
    size: Annotated[str, Field(description="WIDTHxHEIGHT in pixels, or auto.")] = "auto"
    seed: Annotated[
        int | None, Field(ge=0, le=MAX_SEED, description="Of the first picture; the next are +1.")
    ] = None
    response_format: Literal["b64_json"] = "b64_json"
    num_decoder_steps: Annotated[int, Field(description="K, as the model was distilled for.")] = 4
    guidance_scale: float = 1.0
    negative_prompt: str = ""
    image: Annotated[str | None, Field(description="A picture to draw over, in base64.")] = None
    strength: Annotated[float, Field(description="How much of it is drawn anew.")] = 0.8
    user: Annotated[str | None, Field(description="Not read.", max_length=256)] = None


class DrawnImage(BaseModel):
    """A PNG file in base64, and the seed that draws it again."""

    b64_json: str
    seed: int


class ImageResponse(BaseModel):
    """As OpenAI's."""

    created: int
    data: list[DrawnImage]


def make_app(service: Service, hosts: list[str] | None = None) -> FastAPI:
    """The API as an ASGI application, whose life is that of the service.

    Args:
        service: what draws.
        hosts: names that requests may call this machine by; None for any. A page elsewhere that
            has its own name point here gets nothing that way.
    """

    @asynccontextmanager
    async def life(_app: FastAPI) -> Any:
        async with service.running():
            yield

    app = FastAPIOffline(title="TiUE", version="1", lifespan=life)
    app.add_middleware(BoundedBodies, most=2 * service.limits.max_upload)
    if hosts is not None:
        app.add_middleware(TrustedHostMiddleware, allowed_hosts=hosts, www_redirect=False)
    _add_errors(app, service)

    @app.post("/v1/images/generations")
    async def generations(asked: ImageRequest, request: Request) -> ImageResponse:
        if asked.model not in (None, service.engine.name):
            raise InputError(f"the model here is {service.engine.name}: ask for it, or for none")
        service.limits.check_count(asked.n)
        drawings = _drawings(asked, service)
        pictures = await _while_connected(request, service.draw(drawings, "api"))
        data = await asyncio.to_thread(lambda: [_in_base64(picture) for picture in pictures])
        return ImageResponse(created=int(time.time()), data=data)

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        served = {"id": service.engine.name, "object": "model", "created": 0, "owned_by": "tiue"}
        return {"object": "list", "data": [served]}

    @app.get("/health")
    async def health() -> dict[str, str]:
        return {"status": "ok"}

    @app.get("/ready")
    async def ready(response: Response) -> dict[str, str]:
        response.status_code = 200 if service.ready else 503
        return {"status": "ready" if service.ready else "not ready"}

    @app.get("/metrics", response_class=PlainTextResponse)
    async def metrics() -> Response:
        return Response(generate_latest(service.registry), media_type=CONTENT_TYPE_LATEST)

    return app


def _drawings(asked: ImageRequest, service: Service) -> list[Drawing]:
    width = height = None
    if asked.size != "auto":
        sides = asked.size.split("x")
        if len(sides) != 2 or not all(s.isascii() and s.isdigit() and len(s) < 6 for s in sides):
            raise InputError("size is WIDTHxHEIGHT, such as 512x512, or auto")
        width, height = map(int, sides)
    # Within what a client's JSON can hold without loss.
    seed = secrets.randbelow(2**32) if asked.seed is None else asked.seed
    image = None if asked.image is None else service.limits.read_base64(asked.image)
    return [
        Drawing(
            prompt=asked.prompt,
            seed=seed + index,
            height=height,
            width=width,
            num_decoder_steps=asked.num_decoder_steps,
            guidance_scale=asked.guidance_scale,
            negative_prompt=asked.negative_prompt,
            image=image,
            strength=asked.strength,
        )
        for index in range(asked.n)
    ]


async def _while_connected(request: Request, work: Awaitable[_Result]) -> _Result:
    """The result of work, which ends when the client hangs up."""
    drawing = asyncio.ensure_future(work)
    # The body has been read: all that can come is that the client is gone.
    gone = asyncio.ensure_future(request.receive())
    try:
        await asyncio.wait({drawing, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not drawing.done():
            raise HungUpError
        return drawing.result()
    finally:
        drawing.cancel()
        gone.cancel()


def _in_base64(picture: Picture) -> DrawnImage:
    file = io.BytesIO()
    picture.image.save(file, "PNG")
    return DrawnImage(b64_json=base64.b64encode(file.getvalue()).decode(), seed=picture.seed)


def _add_errors(app: FastAPI, service: Service) -> None:
    """Answer whatever goes wrong in OpenAI's form, with a sentence and without a traceback."""

    def answer(
        status: int, message: str, param: str | None = None, retry_after: int | None = None
    ) -> JSONResponse:
        kind = "invalid_request_error" if status < 500 else "server_error"
        kind = "rate_limit_error" if status == 429 else kind
        headers = {} if retry_after is None else {"Retry-After": str(retry_after)}
        error = {"message": message, "type": kind, "param": param, "code": None}
        return JSONResponse({"error": error}, status, headers)

    async def handle(_request: Request, error: Exception) -> Response:
        if isinstance(error, RequestValidationError):
            first = error.errors()[0]
            param = ".".join(str(part) for part in first["loc"][1:]) or None
            return answer(400, f"{param or 'the body'}: {first['msg']}", param)
        if isinstance(error, InputError):
            return answer(400, str(error))
        if isinstance(error, HTTPException):
            return answer(error.status_code, str(error.detail))
        if isinstance(error, QueueFullError):
            return answer(429, str(error), retry_after=error.retry_after)
        if isinstance(error, ClosedError):
            return answer(503, str(error), retry_after=5)
        if isinstance(error, TimeoutError):
            return answer(504, f"this took more than {service.limits.timeout:g} s and was left")
        if isinstance(error, HungUpError):
            return Response(status_code=499)
        _log.error("a request failed", exc_info=error)
        if is_out_of_memory(error):
            return answer(503, "out of memory; ask for a smaller picture", retry_after=1)
        return answer(500, "the picture could not be drawn; the service's log says why")

    known: list[type[Exception]] = [RequestValidationError, HTTPException, InputError]
    known += [QueueFullError, ClosedError, TimeoutError, HungUpError]
    # By name, although they are exceptions: what only `Exception` handles is raised again too.
    known += [RuntimeError, ArithmeticError, MemoryError, Exception]
    for kind in known:
        app.add_exception_handler(kind, handle)
