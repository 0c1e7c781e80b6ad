"""Requests of bounded size."""

from __future__ import annotations

from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send


class BoundedBodies:
    """Refuses bodies over a size by their head, or once they have grown past it.

    Args:
        app: what gets the others.
        most: bytes.
    """

    def __init__(self, app: ASGIApp, most: int) -> None:
        self._app = app
        self._most = most

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        told = dict(scope["headers"]).get(b"content-length", b"0")
        if told.isdigit() and int(told) > self._most:
            message = f"a request may have {self._most} bytes"
            error = {"message": message, "type": "invalid_request_error", "param": None}
            response = JSONResponse({"error": error | {"code": None}}, 413)
            await response(scope, receive, send)
            return
        got = 0

        async def bounded() -> Message:
            nonlocal got
            message = await receive()
            got += len(message.get("body", b""))
            if got > self._most:
                raise HTTPException(413, f"a request may have {self._most} bytes")
            return message

        await self._app(scope, bounded, send)
