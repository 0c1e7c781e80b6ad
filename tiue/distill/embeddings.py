"""Text embeddings on disk: written once, checked by checksum, memory-mapped at training.

A folder holds `embeddings-<n>.safetensors` (float16 [rows, L, D]), `empty.safetensors` (the empty
prompt), `prompts.jsonl` (the prompts, one JSON string a line) and `index.json`, written last.
"""

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm import tqdm

from tiue.distill.files import sha256, write_file, write_json
from tiue.distill.loading import load_text_encoder
from tiue.distill.prompts import prompts_digest, read_prompts
from tiue.errors import InputError, OutputError

INDEX = "index.json"
_PROMPTS, _EMPTY, _KEY = "prompts.jsonl", "empty.safetensors", "prompt_embeds"


def embed_text(
    teacher: str,
    prompts: str | Path,
    output: Path,
    prompt_column: str | None = None,
    shard_size: int = 8192,
    batch_size: int = 64,
    cpu: bool = False,
    report: Callable[[str], object] | None = None,
) -> Path:
    """Write the text embeddings of prompts in float16, for `DistillConfig.embeddings`.

    Shards that an interrupted call left complete are kept if their checksum holds.

    Args:
        teacher: Folder or hub id of the pipeline whose text encoder is asked.
        prompts: As `read_prompts`.
        output: Folder for shards and index.
        prompt_column: As `read_prompts`.
        shard_size: Prompts a shard.
        batch_size: Prompts at once.
        cpu: Use the CPU even where there is a GPU.
        report: Called with a line of text at the end.

    Returns:
        The folder.

    Raises:
        CheckpointError: If tokenizer or text encoder cannot be loaded.
        InputError: If the prompts cannot be read.
        OutputError: If the folder cannot be written, or holds embeddings of something else.
    """
    texts = read_prompts(prompts, prompt_column)
    output = Path(output)
    facts = {
        "teacher": teacher, "count": len(texts), "shard_size": shard_size,
        "prompts_sha256": prompts_digest(texts), "dtype": "float16",
    }  # fmt: skip
    index = _begin(output, facts)
    found = torch.accelerator.current_accelerator(check_available=True)
    device = torch.device("cpu") if cpu or found is None else found
    encoder = load_text_encoder(teacher, device)
    lines = "".join(json.dumps(text, ensure_ascii=False) + "\n" for text in texts)
    write_file(output / _PROMPTS, lambda path: path.write_text(lines, encoding="utf-8"))
    empty = encoder([""]).half().cpu()
    write_file(output / _EMPTY, partial(save_file, {_KEY: empty}))
    index["files"] = {name: sha256(output / name) for name in (_PROMPTS, _EMPTY)}
    index["shape"] = list(empty.shape[1:])

    kept = {shard["file"]: shard for shard in index.get("shards", []) if _is_whole(output, shard)}
    index["shards"] = []
    for number, start in enumerate(tqdm(range(0, len(texts), shard_size), unit="shard")):
        name = f"embeddings-{number:05d}.safetensors"
        if name not in kept:
            rows = texts[start : start + shard_size]
            batches = [
                encoder(rows[i : i + batch_size]).half().cpu()
                for i in range(0, len(rows), batch_size)
            ]
            shard = torch.cat(batches)
            write_file(output / name, partial(save_file, {_KEY: shard}))
            kept[name] = {"file": name, "rows": len(rows), "sha256": sha256(output / name)}
        index["shards"].append(kept[name])
        write_json(output / INDEX, index)
    write_json(output / INDEX, index | {"complete": True})
    if report is not None:
        report(f"{len(texts)} embeddings in {len(index['shards'])} shards are in {output}.")
    return output


class StoredPrompts:
    """Embeddings that `embed_text` wrote, memory-mapped: a batch reads its own rows alone.

    Args:
        folder: The folder.
        device: Where batches go.
        verify: Compare every file with its checksum first.

    Raises:
        InputError: If the folder is missing, incomplete, or a file is damaged.
    """

    def __init__(self, folder: Path, device: torch.device, verify: bool = True) -> None:
        index = _read_index(folder)
        if index is None or not index.get("complete"):
            raise InputError(
                f"'{folder}' holds no finished embeddings. Write them with `tiue embed-text`; the "
                "same command goes on where it was."
            )
        if verify:
            _verify(folder, index)
        self._device, self._shard_size = device, index["shard_size"]
        try:
            with open(folder / _PROMPTS, encoding="utf-8") as file:
                self.prompts: list[str] = [json.loads(line) for line in file]
            self.empty = load_file(folder / _EMPTY)[_KEY].float().to(device)
            self._files = [
                safe_open(folder / shard["file"], framework="pt") for shard in index["shards"]
            ]
            # get_tensor on a memory-mapped file reads nothing yet.
            self._shards = [file.get_tensor(_KEY) for file in self._files]
        except (OSError, ValueError, KeyError, SafetensorError) as error:
            raise InputError(f"Cannot read the embeddings in '{folder}' ({error}).") from error
        rows, shape = sum(len(shard) for shard in self._shards), index["shape"]
        if rows != len(self.prompts) or any([*s.shape[1:]] != shape for s in self._shards):
            raise InputError(f"The shards in '{folder}' do not fit its {INDEX}. Write them again.")

    def __getitem__(self, indices: Tensor) -> Tensor:
        """Return the embeddings of the prompts at `indices` [B]: [B, L, D] on the device."""
        size = self._shard_size
        rows = [self._shards[index // size][index % size] for index in indices.tolist()]
        return torch.stack(rows).to(self._device).float()


def _begin(output: Path, facts: dict[str, Any]) -> dict[str, Any]:
    """The index to go on from: of the same prompts and teacher, or a new one."""
    found = _read_index(output)
    if found is None:
        return dict(facts)
    different = [name for name in facts if found.get(name) != facts[name]]
    if different:
        raise OutputError(
            f"'{output}' holds embeddings of something else ({', '.join(different)} differ). "
            "Choose another folder."
        )
    return {name: value for name, value in found.items() if name != "complete"}


def _read_index(folder: Path) -> dict[str, Any] | None:
    path = folder / INDEX
    if not path.exists():
        return None
    try:
        index = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"'{path}' is damaged ({error}). Write the embeddings again.") from error
    if not isinstance(index, dict):
        raise InputError(f"'{path}' is damaged (no JSON object). Write the embeddings again.")
    return index


def _verify(folder: Path, index: dict[str, Any]) -> None:
    files = [*index["files"].items(), *((s["file"], s["sha256"]) for s in index["shards"])]
    for name, expected in tqdm(files, desc="checksums", unit="file", leave=False):
        try:
            actual = sha256(folder / name)
        except OSError as error:
            raise InputError(f"Cannot read '{folder / name}' ({error}).") from error
        if actual != expected:
            raise InputError(
                f"'{folder / name}' is damaged: its checksum is not the one in {INDEX}. Run "
                "`tiue embed-text` again with the same arguments: it writes damaged files anew."
            )


def _is_whole(folder: Path, shard: dict[str, Any]) -> bool:
    path = folder / shard["file"]
    return path.exists() and sha256(path) == shard["sha256"]
