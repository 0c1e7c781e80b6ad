"""The same API on many machines: `serve run tiue.serve.ray:app` (Ray Serve).

One door takes requests, checks them and answers; replicas of the engine draw, each its own passes
of what comes to it together. A replica that dies takes no request along: its drawings go to
another, where their seeds give the same pictures.
"""

from __future__ import annotations

import asyncio
import logging
import math
import threading
from collections.abc import Sequence
from typing import Any

from pydantic import BaseModel, ConfigDict, Field
from ray import serve
from ray.exceptions import RayActorError
from ray.serve.exceptions import (
    BackPressureError,
    DeploymentUnavailableError,
    ReplicaUnavailableError,
)
from ray.serve.metrics import Histogram

from tiue.devices import Dtype
from tiue.errors import InputError
from tiue.generate.request import LoRA, Request
from tiue.serve.api import make_app
from tiue.serve.batching import ClosedError, QueueFullError
from tiue.serve.command import LOCAL, load_engine
from tiue.serve.engine import Drawing, Picture, Rules
from tiue.serve.limits import Limits
from tiue.serve.service import Service

_log = logging.getLogger(__name__)
# A drawing that four replicas died of is at fault itself.
_ATTEMPTS = 4


class Settings(BaseModel):
    """What `serve run tiue.serve.ray:app NAME=VALUE` takes, as `tiue serve` does."""

    model_config = ConfigDict(extra="forbid")

    model: str | None = None
    lora: list[str] = []
    vae: str | None = None
    device: str = "auto"
    dtype: Dtype = Dtype.auto
    compile: bool = False
    min_replicas: int = Field(1, ge=1, description="Of the engine; each loads the model.")
    max_replicas: int = Field(1, ge=1, description="Above the least, Ray scales by what waits.")
    num_cpus: float = Field(1, ge=0, description="A replica, and threads of it.")
    num_gpus: float = Field(0, ge=0, description="A replica.")
    max_batch: int = Field(8, ge=1, description="Pictures of one pass.")
    max_wait: float = Field(5.0, ge=0, description="Milliseconds that a pass waits for others.")
    max_waiting: int = Field(64, ge=1, description="Pictures asked for at once; then 429.")
    max_images: int = Field(8, ge=1, description="Pictures a request.")
    max_side: int | None = Field(None, ge=1, description="Pixels.")
    timeout: float = Field(60.0, ge=0.1, description="Seconds a request may take.")
    allowed_host: list[str] = Field([], description="Names that clients may call this by.")

    def limits(self) -> Limits:
        """On what is asked.

        Raises:
            InputError: one request may be larger than all that may wait.
        """
        if self.max_images > self.max_waiting:
            raise InputError("max_images of one request must fit in max_waiting")
        return Limits(
            max_batch=self.max_batch,
            max_wait=self.max_wait / 1000,
            max_waiting=self.max_waiting,
            max_images=self.max_images,
            max_side=self.max_side,
            timeout=self.timeout,
        )


class Drawer:
    """A replica: one engine, whose passes Ray's batches are."""

    def __init__(self, settings: Settings) -> None:
        request = Request(
            model=settings.model,
            loras=[LoRA.parse(text) for text in settings.lora],
            vae=settings.vae,
        )
        request.check()
        self._engine = load_engine(
            request, None, settings.limits(), settings.device, settings.dtype, settings.compile
        )
        self._alone = threading.Lock()
        self._pass.set_max_batch_size(settings.max_batch)
        self._pass.set_batch_wait_timeout_s(settings.max_wait / 1000)
        self._sizes = Histogram(
            "tiue_batch_size", "Pictures of a pass", boundaries=[1, 2, 4, 8, 16, 32]
        )

    def rules(self) -> Rules:
        """What may be asked of the model; the embedded one's teacher is for the page alone."""
        rules = self._engine.rules
        rules.models = rules.models[:1]
        return rules

    async def draw(self, drawing: Drawing) -> Picture:
        """Draw with whatever has the same key and comes at the same time."""
        picture = await self._pass(drawing)
        if isinstance(picture, Exception):
            raise picture
        return picture

    @serve.batch  # one at a time; its bounds are set above
    async def _pass(self, drawings: list[Drawing]) -> list[Picture | Exception]:
        found: dict[int, Picture | Exception] = {}
        by_key: dict[Any, list[int]] = {}
        for place, drawing in enumerate(drawings):
            by_key.setdefault(drawing.key, []).append(place)
        for places in by_key.values():
            same = [drawings[place] for place in places]
            found |= zip(places, await asyncio.to_thread(self._draw, same), strict=True)
        return [found[place] for place in range(len(drawings))]

    def _draw(self, drawings: Sequence[Drawing]) -> list[Picture | Exception]:
        """Pictures; if a pass fails, each alone, so that only who is at fault hears of it."""
        try:
            with self._alone:
                pictures = self._engine.draw(drawings)
            self._sizes.observe(len(drawings))
            return [*pictures]
        except Exception as error:
            if len(drawings) == 1:
                return [error]
            return [found for drawing in drawings for found in self._draw([drawing])]


class Replicas:
    """Where drawings wait, as a `Batcher` is: what draws them is a replica somewhere.

    Args:
        drawer: the handle of `Drawer`.
        limits: on what may wait.
    """

    def __init__(self, drawer: Any, limits: Limits) -> None:
        self._drawer = drawer
        self._limits = limits
        self._waiting = 0
        self._closing = False

    def __len__(self) -> int:
        return self._waiting

    def start(self) -> None:
        """Nothing: replicas run already."""

    async def draw(self, drawings: Sequence[Drawing]) -> list[Picture]:
        """Wait for pictures; who is cancelled is not drawn for where that has not begun.

        Raises:
            QueueFullError: there is no room for all.
            ClosedError: the service is ending, or no replica lives long enough.
        """
        if self._closing:
            raise ClosedError("the service is ending")
        if self._waiting + len(drawings) > self._limits.max_waiting:
            raise QueueFullError(max(1, math.ceil(self._waiting / self._limits.max_batch)))
        self._waiting += len(drawings)
        tasks = [asyncio.ensure_future(self._of_one(drawing)) for drawing in drawings]
        try:
            return list(await asyncio.gather(*tasks))
        finally:
            for task in tasks:
                task.cancel()
            self._waiting -= len(drawings)

    async def close(self) -> None:
        """Take nothing new; Ray waits for what was begun."""
        self._closing = True

    async def _of_one(self, drawing: Drawing) -> Picture:
        for attempt in range(_ATTEMPTS):
            response = self._drawer.draw.remote(drawing)
            try:
                return await response
            except asyncio.CancelledError:
                response.cancel()
                raise
            except BackPressureError as error:
                raise QueueFullError(1) from error
            except (RayActorError, DeploymentUnavailableError, ReplicaUnavailableError) as error:
                _log.warning("a replica died while it drew; another is asked: %s", error)
                await asyncio.sleep(0.2 * 2**attempt)
        raise ClosedError(f"{_ATTEMPTS} replicas died while they drew this; come back")


class Door:
    """Takes requests, checks them by the replicas' rules, and has them drawn."""

    async def __init__(self, settings: Settings, drawer: Any) -> None:  # type: ignore[misc]
        rules = await drawer.rules.remote()
        hosts = [*LOCAL, "[::1]", *settings.allowed_host]
        self._app = make_app(Service(rules, Replicas(drawer, rules.limits)), hosts)

    def __serve_build_asgi_app__(self) -> Any:
        """What Ray asks for once the replica is made."""
        return self._app


def app(arguments: Settings | dict[str, Any]) -> Any:
    """Ray Serve's application, of `serve run tiue.serve.ray:app NAME=VALUE ...`.

    Args:
        arguments: of `Settings`, by name; all have defaults.

    Raises:
        ValidationError: one that is none, or of a wrong value.
    """
    settings = Settings.model_validate(arguments)
    settings.limits()
    least, most = settings.min_replicas, max(settings.min_replicas, settings.max_replicas)
    scaling: dict[str, Any] = {"num_replicas": least}
    if most > least:
        scaling = {
            "autoscaling_config": {
                "min_replicas": least,
                "max_replicas": most,
                "target_ongoing_requests": settings.max_batch,
            }
        }
    drawer = serve.deployment(
        Drawer,
        **scaling,
        # Another pass waits at the replica while one is drawn.
        max_ongoing_requests=2 * settings.max_batch,
        ray_actor_options={"num_cpus": settings.num_cpus, "num_gpus": settings.num_gpus},
    )
    door = serve.deployment(
        serve.ingress()(Door), max_ongoing_requests=1000, ray_actor_options={"num_cpus": 0}
    )
    return door.bind(settings, drawer.bind(settings))
