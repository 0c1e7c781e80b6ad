"""Tuned launch configurations: data, by operator, shape bucket and device.

`<operator>,device_name=<name>.json` holds what `python -m tiue_kernels.tune` found on one device:
first in the user's folder (TIUE_CONFIGS, by default ~/.cache/tiue/configs), then here. A device
that has no file takes those of the nearest one of its compute capability, and says so once; where
there is none, and for shapes that no file names, the launchers' own heuristics stand.

Files are read once a device, at its first launch, and looked up in memory from then on.
"""

from __future__ import annotations

import functools
import json
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

logger = logging.getLogger(__name__)

Config = dict[str, int]
# By operator, then by shape bucket.
Tables = dict[str, dict[str, Config]]

VARIABLE = "TIUE_CONFIGS"
PACKAGE = Path(__file__).parent
# Of a device that is not there: kernels that are compiled or interpreted on a CPU.
H100_MULTIPROCESSORS = 132

_tables: dict[str, Tables] = {}  # by device name
_forced: dict[tuple[str, str], Config] = {}
_seen: list[tuple[str, str, Config]] | None = None


def choose(operator: str, bucket: str, heuristic: Config, device: torch.device) -> Config:
    """The configuration that a launch takes.

    Args:
        operator: its name, as in `tiue_kernels.functional`.
        bucket: the kernel and what of the shape decides, as one word.
        heuristic: what holds where nothing was tuned.
        device: where it is launched.

    Returns:
        The tuned configuration, or `heuristic` itself.
    """
    if _seen is not None:
        _seen.append((operator, bucket, heuristic))
    if _forced:
        return _forced.get((operator, bucket), heuristic)
    if device.type != "cuda":
        return heuristic
    return _table(device).get(operator, {}).get(bucket, heuristic)


def has_choice(operator: str, device: torch.device) -> bool:
    """Whether `choose` may answer with anything but the heuristic, or has to be told of it."""
    if _seen is not None or _forced:
        return True
    return device.type == "cuda" and operator in _table(device)


def _table(device: torch.device) -> Tables:
    name = _device_name(device.index)
    if name not in _tables:
        _tables[name] = _load(name, torch.cuda.get_device_capability(device), device)
    return _tables[name]


def multiprocessors(device: torch.device) -> int:
    """Multiprocessors of a GPU; of an H100 where the device is none."""
    if device.type != "cuda":
        return H100_MULTIPROCESSORS
    return _multiprocessors(device.index)


@functools.cache
def _multiprocessors(index: int | None) -> int:
    return torch.cuda.get_device_properties(index).multi_processor_count


@functools.cache
def _device_name(index: int | None) -> str:
    return torch.cuda.get_device_name(index)


def user_folder() -> Path:
    """Where `python -m tiue_kernels.tune` writes, and what is read first."""
    if folder := os.environ.get(VARIABLE):
        return Path(folder)
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache) / "tiue" / "configs"


def file_name(operator: str, device_name: str) -> str:
    """Of one operator's file for one device."""
    return f"{operator},device_name={device_name.replace(' ', '_').replace('/', '_')}.json"


def write(folder: Path, operator: str, device: torch.device, found: dict[str, Config]) -> Path:
    """Write one operator's configurations for a device, whole or not at all; those there stay.

    Args:
        folder: made where it is missing.
        operator: its name.
        device: that they were timed on.
        found: configuration by shape bucket.

    Returns:
        The file.
    """
    name, capability = "CPU, interpreted", (0, 0)
    if device.type == "cuda":
        name, capability = _device_name(device.index), torch.cuda.get_device_capability(device)
    path = folder / file_name(operator, name)
    kept = _read(path)["configs"] if path.exists() else {}
    content = {
        "device": name,
        "capability": list(capability),
        "multiprocessors": multiprocessors(device),
        "configs": dict(sorted((kept | found).items())),
    }
    folder.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    temporary.replace(path)
    return path


def _read(path: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    for config in content["configs"].values():
        if not all(isinstance(value, int) and value > 0 for value in config.values()):
            raise ValueError("a configuration holds whole numbers above 0")
    return content


def _load(name: str, capability: tuple[int, int], device: torch.device) -> Tables:
    """Every operator's table for a device: the user's before the package's, its own before others'.

    A file that cannot be read is left out, and the log says so.
    """
    # The lowest in rank first: what follows replaces it, operator by operator.
    ranked: list[tuple[tuple[bool, int, bool], str, dict[str, Any]]] = []
    for folder in (PACKAGE, user_folder()):
        for path in sorted(folder.glob("*,device_name=*.json")):
            try:
                content = _read(path)
                other, count = tuple(content["capability"]), content["multiprocessors"]
                own = content["device"] == name
            except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
                logger.warning("%s is left out: %s.", path, error)
                continue
            if own or other == capability:
                rank = (own, -abs(count - multiprocessors(device)), folder != PACKAGE)
                ranked.append((rank, path.name.partition(",")[0], content))
    tables: Tables = {}
    borrowed = set()
    for (own, *_), operator, content in sorted(ranked, key=lambda entry: entry[0]):
        tables[operator] = content["configs"]
        borrowed.discard(operator)
        if not own:
            borrowed.add(operator)
    if borrowed or not tables:
        logger.info(
            "No launch configurations were tuned for %s%s. python -m tiue_kernels.tune makes them.",
            name,
            f": another device's serve {', '.join(sorted(borrowed))}" if borrowed else "",
        )
    return tables


def in_use() -> dict[str, Tables]:
    """The tables of every device that launched anything, for a training checkpoint.

    Another configuration sums in another order: a run resumes bit for bit under its own alone.
    """
    return {name: {op: dict(table) for op, table in _tables[name].items()} for name in _tables}


def use(tables: dict[str, Tables]) -> list[str]:
    """Take what `in_use` gave, for the devices that it names, in the place of any file.

    Args:
        tables: by device name.

    Returns:
        Names of devices for which this changes something.
    """
    changed = [name for name, table in tables.items() if _tables.get(name) != table]
    _tables.update(tables)
    return changed


def reset() -> None:
    """Forget what was read; for use after files changed."""
    _tables.clear()


@contextmanager
def forced(operator: str, bucket: str, config: Config) -> Iterator[None]:
    """Inside, launches of one bucket take this configuration and all others their heuristics."""
    _forced[operator, bucket] = config
    try:
        yield
    finally:
        del _forced[operator, bucket]


@contextmanager
def recorded() -> Iterator[list[tuple[str, str, Config]]]:
    """Collects operator, bucket and heuristic of every choice made inside."""
    global _seen
    before, _seen = _seen, []
    try:
        yield _seen
    finally:
        _seen = before
