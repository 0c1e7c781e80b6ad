"""Checkpoints and adapters that are one file each: safetensors only, and there."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from tiue.errors import CheckpointError, InputError, TiUEError
from tiue.loading.checks import PICKLES, pickle_message

_LINKS = ("https://", "http://", "huggingface.co/", "hf.co/")
_CONVERSIONS = {
    "LoRA": "save_file(weights, new_file)",
    "textual inversion": "save_file(weights, new_file)",
    "IP-Adapter": (
        'save_file({f"{part}.{key}": value for part in weights for key, value in'
        " weights[part].items()}, new_file)"
    ),
}


def check_file(path: str | os.PathLike[str], message: str) -> None:
    """See that a file holds safetensors, whatever its name says.

    Args:
        path: A file that is there.
        message: What to say of a pickle.

    Raises:
        CheckpointError: It is a pickle or damaged.
    """
    name = os.fspath(path)
    if Path(name).suffix.lower() in PICKLES:
        raise CheckpointError(message)
    try:
        with safe_open(name, framework="pt"):
            pass
    except (SafetensorError, OSError) as error:
        if _is_pickle(name):
            raise CheckpointError(
                f"{name} is named .safetensors and is a pickle. {message}"
            ) from error
        raise CheckpointError(f"{name} is damaged ({error}); fetch it again") from error


def _is_pickle(path: str) -> bool:
    """By its first bytes: a pickle's protocol, or the zip file that torch wraps around one."""
    with open(path, "rb") as file:
        head = file.read(4)
    return head[:1] == b"\x80" or head == b"PK\x03\x04"


def load_single_file(load: Callable[..., Any], model: str | os.PathLike[str], **kwargs: Any) -> Any:
    """Load a checkpoint that is one .safetensors file.

    Args:
        load: diffusers' `from_single_file` of the class.
        model: The file, or a link to one on the hub.
        **kwargs: As in diffusers; `config` names a folder or hub id of the parts' configuration,
            which is else taken from the hub.

    Returns:
        What `load` gives.

    Raises:
        CheckpointError: No such file, a pickle, damaged, or of another architecture.
    """
    name = os.fspath(model)
    is_link = name.startswith(_LINKS)
    if Path(name).suffix.lower() != ".safetensors":
        raise CheckpointError(
            f"{name} is a folder: load it with from_pretrained"
            if Path(name).is_dir()
            else pickle_message(name)
        )
    if not is_link:
        if not Path(name).is_file():
            raise CheckpointError(
                f"there is no file {name}; give a .safetensors file, or its link on the hub"
            )
        check_file(name, pickle_message(name))
    try:
        return load(name, **kwargs)
    except TiUEError:
        raise
    except Exception as error:  # diffusers' own, the hub's, and whatever keys that lack lead to
        hint = (
            ""
            if kwargs.get("config")
            else ("; its configuration is looked for on the hub, config=FOLDER_OR_ID names another")
        )
        raise CheckpointError(f"cannot load {name}: {_first_line(error)}{hint}") from error


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0]}" if isinstance(error, KeyError) else lines[0]


def check_adapter(kind: str, source: Any, weight_name: Any = None, subfolder: Any = None) -> None:
    """See that a LoRA, an IP-Adapter or a textual inversion is no pickle, before it is read.

    Args:
        kind: "LoRA", "IP-Adapter" or "textual inversion".
        source: A file, a folder, a hub id, or the weights themselves; or a list of them.
        weight_name: The file in a folder or on the hub, or one for each.
        subfolder: Where in the folder, or one for each.

    Raises:
        CheckpointError: A pickle; the message says how to convert it.
    """
    sources = source if isinstance(source, (list, tuple)) else [source]
    names = weight_name if isinstance(weight_name, (list, tuple)) else [weight_name]
    folders = subfolder if isinstance(subfolder, (list, tuple)) else [subfolder]
    count = max(map(len, (sources, names, folders)))
    for index in range(count):
        given, name, folder = (
            entries[min(index, len(entries) - 1)] for entries in (sources, names, folders)
        )
        if isinstance(given, (str, os.PathLike)):
            _check_adapter(kind, Path(given), name, folder or "")


def _check_adapter(kind: str, source: Path, name: str | None, folder: str) -> None:
    path = source / folder / name if name else source
    if path.is_dir():
        suffixes = {entry.suffix for entry in path.iterdir()}
        if ".safetensors" not in suffixes and suffixes & PICKLES:
            raise CheckpointError(adapter_message(kind, path))
    elif path.is_file():
        check_file(path, adapter_message(kind, path))
    elif path.suffix.lower() in PICKLES:
        raise CheckpointError(adapter_message(kind, path))


def adapter_message(kind: str, path: str | os.PathLike[str]) -> str:
    """Say that a pickled adapter is not loaded and how to convert it."""
    return (
        f"{os.fspath(path)} is a pickled {kind}, which can run code when loaded; only safetensors"
        " are loaded. If you trust the file, convert it: weights = torch.load(file,"
        f" weights_only=True); safetensors.torch.{_CONVERSIONS[kind]}"
    )


def only_safetensors(kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a loader that takes pickles too, so that it takes none.

    Raises:
        InputError: It is asked to.
    """
    if not kwargs.setdefault("use_safetensors", True):
        raise InputError("use_safetensors=False: only safetensors are loaded; leave it out")
    return kwargs
