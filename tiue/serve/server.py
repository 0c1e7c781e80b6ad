"""uvicorn's server, which says where it listens and lets open pages go when it ends."""

from __future__ import annotations

from collections.abc import Callable
from types import FrameType
from typing import Any

import uvicorn


class Server(uvicorn.Server):
    """Ends on SIGINT or SIGTERM when what was begun has been answered.

    Args:
        config: uvicorn's.
        on_ready: told the address once requests are answered.
    """

    def __init__(self, config: uvicorn.Config, on_ready: Callable[[str], None]) -> None:
        super().__init__(config)
        self._on_ready = on_ready

    async def startup(self, sockets: Any = None) -> None:
        """uvicorn's, then the word."""
        await super().startup(sockets)
        if self.started:
            host, port = self.servers[0].sockets[0].getsockname()[:2]
            self._on_ready(f"http://{f'[{host}]' if ':' in host else host}:{port}")

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """uvicorn's; and pages' heartbeats, which would never end by themselves, do."""
        super().handle_exit(sig, frame)
        app: Any = self.config.app
        for route in app.routes:
            stop = getattr(getattr(route, "app", None), "stop_event", None)
            if stop is not None:
                stop.set()
