"""Text embeddings on disk: written once, checked by checksum, memory-mapped at training.

A folder holds `embeddings-<n>.safetensors`, `empty.safetensors` (the empty prompt, whole),
`prompts.jsonl` (the prompts, one JSON string a line) and `index.json`, written last. A shard holds
`prompt_embeds`, [rows, L, D] float16, `pooled`, [rows, P], of SDXL and Stable Diffusion 3, and
PixArt's `mask`, [rows, L]. Two forms are smaller, and
lossy: int8, with one `scale` [L, D] a shard, and unpadded, which holds real tokens alone,
[tokens, D], of row i those from `starts[i]` on.
"""

import json
import shutil
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from filelock import FileLock, Timeout
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm import tqdm

from tiue.distill.loading import load_text_encoder
from tiue.distill.output import LOCK
from tiue.distill.processes import require_shared_work
from tiue.distill.prompts import prompts_digest, read_prompts
from tiue.distill.text import Encoder, Text, join
from tiue.errors import InputError, OutputError
from tiue.files import sha256, write_file, write_json

INDEX = "index.json"
_PROMPTS, _EMPTY, _VERIFIED = "prompts.jsonl", "empty.safetensors", "verified.json"
_KEY, _SCALE, _STARTS = "prompt_embeds", "scale", "starts"
_BESIDE = ("pooled", "mask")  # what a text has besides its tokens, in float16
_COUNTED = 1 << 16  # prompts tokenized at once


def embed_text(
    teacher: str,
    prompts: str | Path,
    output: Path,
    prompt_column: str | None = None,
    shard_size: int = 8192,
    batch_size: int = 64,
    cpu: bool = False,
    report: Callable[[str], object] | None = None,
    int8: bool = False,
    unpadded: bool = False,
) -> Path:
    """Write the text embeddings of prompts, for `DistillConfig.embeddings`.

    Shards that an interrupted call left complete are kept if their checksum holds. Under
    `accelerate launch` the processes share the shards.

    Args:
        teacher: Folder or hub id of the pipeline whose text encoders are asked.
        prompts: As `read_prompts`.
        output: Folder for shards and index.
        prompt_column: As `read_prompts`.
        shard_size: Prompts a shard.
        batch_size: Prompts at once.
        cpu: Use the CPU even where there is a GPU.
        report: Called with lines of text.
        int8: Round to 255 steps of each place's largest value, half the size; lossy.
        unpadded: Store real tokens alone; the last one stands for the padding when they are read,
            which Stable Diffusion's text encoder fills otherwise: lossy.

    Returns:
        The folder.

    Raises:
        CheckpointError: If tokenizer or text encoder cannot be loaded.
        InputError: If the prompts cannot be read, or processes do not know of one another.
        OutputError: If the folder cannot be written, has no room, or holds embeddings of something
            else.
    """
    state = PartialState(cpu=cpu)
    require_shared_work(state.num_processes)
    tell = report if report is not None and state.is_main_process else lambda _: None
    texts = read_prompts(prompts, prompt_column, tell)
    output = Path(output)
    facts = {
        "teacher": teacher, "count": len(texts), "shard_size": shard_size,
        "prompts_sha256": prompts_digest(texts), "dtype": "int8" if int8 else "float16",
        "unpadded": unpadded,
    }  # fmt: skip
    encoder = load_text_encoder(teacher, state.device)
    empty = encoder.empty().map(lambda tensor: tensor.half().cpu())
    lock = FileLock(output / LOCK)
    index: dict[str, Any] = {}
    try:
        if state.is_main_process:
            output.mkdir(parents=True, exist_ok=True)
            lock.acquire(timeout=0)
            index = _begin(output, facts)
            _require_room(output, _bytes(encoder, texts, empty, int8, unpadded), tell)
            lines = "".join(json.dumps(text, ensure_ascii=False) + "\n" for text in texts)
            write_file(output / _PROMPTS, lambda path: path.write_text(lines, encoding="utf-8"))
            write_file(output / _EMPTY, partial(save_file, _pack(empty, None, False)))
            index["files"] = {name: sha256(output / name) for name in (_PROMPTS, _EMPTY)}
            index["shape"] = list(empty.tokens.shape[1:])
            write_json(output / INDEX, index)
        state.wait_for_everyone()
        kept = {shard["file"]: shard for shard in (_read_index(output) or {}).get("shards", [])}
        starts = range(0, len(texts), shard_size)
        mine = list(enumerate(starts))[state.process_index :: state.num_processes]
        for number, start in tqdm(mine, unit="shard", disable=not state.is_local_main_process):
            name = f"embeddings-{number:05d}.safetensors"
            if not _is_whole(output, kept.get(name) or _read_note(output, name)):
                rows = texts[start : start + shard_size]
                _write_shard(output / name, encoder, rows, batch_size, int8, unpadded)
            elif name in kept:
                write_json(_note(output, name), kept[name])
        state.wait_for_everyone()
        if state.is_main_process:
            names = [f"embeddings-{number:05d}.safetensors" for number in range(len(starts))]
            index["shards"] = [_read_note(output, name) for name in names]
            write_json(output / INDEX, index | {"complete": True})
            for name in names:
                _note(output, name).unlink()
            sums = {**index["files"], **{s["file"]: s["sha256"] for s in index["shards"]}}
            write_json(output / _VERIFIED, {name: _stamp(output / name) for name in sums})
            tell(f"{len(texts)} embeddings in {len(names)} shards are in {output}.")
        state.wait_for_everyone()
    except Timeout as error:
        raise OutputError(
            f"Another process is writing to '{output}' now. Wait for its end, or choose another "
            "folder."
        ) from error
    finally:
        lock.release()
    return output


def _bytes(encoder: Encoder, texts: list[str], empty: Text, int8: bool, unpadded: bool) -> int:
    """What the shards will take."""
    _, length, width = empty.tokens.shape
    tokens = length * len(texts)
    if unpadded:
        parts = (texts[i : i + _COUNTED] for i in range(0, len(texts), _COUNTED))
        tokens = sum(sum(encoder.lengths(part)) for part in parts)
    pooled = 0 if empty.pooled is None else 2 * empty.pooled.shape[1] * len(texts)
    return tokens * width * (1 if int8 else 2) + pooled


def _require_room(output: Path, needed: int, tell: Callable[[str], object]) -> None:
    free = shutil.disk_usage(output).free
    there = sum(path.stat().st_size for path in output.glob("embeddings-*.safetensors"))
    size, left = f"{needed / 1e9:.3g} GB", f"{free / 1e9:.3g} GB"
    tell(f"The embeddings take {size} in {output}, where {left} are free.")
    if needed - there > free:
        raise OutputError(
            f"The embeddings take {size}, and '{output}' has {left} left. Choose another disk; "
            "--int8 halves them and --unpadded stores real tokens alone, both lossy; or give "
            "`tiue distill` the prompts themselves."
        )


def _write_shard(
    path: Path, encoder: Encoder, rows: list[str], batch_size: int, int8: bool, unpadded: bool
) -> None:
    starts = range(0, len(rows), batch_size)
    text = join([encoder(rows[i : i + batch_size]).map(Tensor.cpu) for i in starts])
    tensors = _pack(text, encoder.lengths(rows) if unpadded else None, int8)
    write_file(path, partial(save_file, tensors))
    note = {"file": path.name, "rows": len(rows), "sha256": sha256(path)}
    write_json(_note(path.parent, path.name), note)


def _pack(text: Text, lengths: list[int] | None, int8: bool) -> dict[str, Tensor]:
    """Text on the CPU as a shard's tensors."""
    tokens, tensors = text.tokens, {}
    if int8:
        tensors[_SCALE] = scale = tokens.abs().amax(0).clamp_min(1e-12) / 127
        tokens = (tokens / scale).round().to(torch.int8)
    else:
        tokens = tokens.half()
    if lengths is not None:
        tensors[_STARTS] = torch.tensor([0, *lengths]).cumsum(0)
        tokens = torch.cat([row[:length] for row, length in zip(tokens, lengths, strict=True)])
    tensors[_KEY] = tokens.contiguous()
    beside = {name: own.half() for name, own in text.tensors().items() if name in _BESIDE}
    return tensors | beside


def _row(shard: dict[str, Tensor], row: int) -> Text:
    """One row of a shard as it was, in float32: [L, D]."""
    tokens, starts, scale = shard[_KEY], shard.get(_STARTS), shard.get(_SCALE)
    own = tokens[row] if starts is None else tokens[starts[row] : starts[row + 1]]
    own = own.float() if scale is None else own.float() * scale[: len(own)]
    beside = {name: shard[name][row].float() for name in _BESIDE if name in shard}
    return Text(own).of({"tokens": own, **beside})


class StoredPrompts:
    """Embeddings that `embed_text` wrote, memory-mapped: a batch reads its own rows alone.

    Args:
        folder: The folder.
        device: Where batches go.
        verify: Compare files with their checksums first, where they have changed since that was
            last done.

    Attributes:
        teacher: Whose text encoder they are of.

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
        self.teacher: str = index["teacher"]
        try:
            with open(folder / _PROMPTS, encoding="utf-8") as file:
                self.prompts: list[str] = [json.loads(line) for line in file]
            empty = load_file(folder / _EMPTY)
            beside = {name: empty[name] for name in _BESIDE if name in empty}
            text = Text(empty[_KEY]).of({"tokens": empty[_KEY], **beside})
            self.empty = text.map(lambda tensor: tensor.float().to(device))
            self._files = [
                safe_open(folder / shard["file"], framework="pt") for shard in index["shards"]
            ]
            # get_tensor on a memory-mapped file reads nothing yet.
            self._shards = [{k: file.get_tensor(k) for k in file.keys()} for file in self._files]  # noqa: SIM118
        except (OSError, ValueError, KeyError, SafetensorError) as error:
            raise InputError(f"Cannot read the embeddings in '{folder}' ({error}).") from error
        rows = sum(shard["rows"] for shard in index["shards"])
        stored = sum(
            len(s[_KEY]) if _STARTS not in s else len(s[_STARTS]) - 1 for s in self._shards
        )
        self._length, width = index["shape"]
        if not rows == stored == len(self.prompts) or any(
            s[_KEY].shape[-1] != width for s in self._shards
        ):
            raise InputError(f"The shards in '{folder}' do not fit its {INDEX}. Write them again.")

    def __getitem__(self, indices: Tensor) -> Text:
        """Return the embeddings of the prompts at `indices` [B], on the device."""
        size = self._shard_size
        rows = [_row(self._shards[index // size], index % size) for index in indices.tolist()]
        whole = [row._replace(tokens=self._padded(row.tokens)) for row in rows]
        text = join([row.map(lambda tensor: tensor[None]) for row in whole])
        return text.map(lambda tensor: tensor.to(self._device))

    def _padded(self, tokens: Tensor) -> Tensor:
        """The last token, which ends the prompt, in the place of the padding: [L, D]."""
        return torch.cat([tokens, tokens[-1:].expand(self._length - len(tokens), -1)])


def _begin(output: Path, facts: dict[str, Any]) -> dict[str, Any]:
    """The index to go on from: of the same prompts and teacher, or a new one."""
    found = _read_index(output)
    if found is None:
        return dict(facts)
    found = {"unpadded": False, **found}
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
    """Compare what has changed since it was last compared: a copy, a file written to."""
    files = {**index["files"], **{s["file"]: s["sha256"] for s in index["shards"]}}
    try:
        seen = json.loads((folder / _VERIFIED).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        seen = {}
    new = [name for name in files if _stamp(folder / name) != seen.get(name)]
    for name in tqdm(new, desc="checksums", unit="file", leave=False, disable=not new):
        expected = files[name]
        try:
            actual = sha256(folder / name)
        except OSError as error:
            raise InputError(f"Cannot read '{folder / name}' ({error}).") from error
        if actual != expected:
            raise InputError(
                f"'{folder / name}' is damaged: its checksum is not the one in {INDEX}. Run "
                "`tiue embed-text` again with the same arguments: it writes damaged files anew."
            )
    if new:
        with suppress(OutputError):  # a folder that cannot be written is compared at every start
            write_json(folder / _VERIFIED, {name: _stamp(folder / name) for name in files})


def _stamp(path: Path) -> list[int] | None:
    try:
        found = path.stat()
    except OSError:
        return None
    return [found.st_size, found.st_mtime_ns]


def _is_whole(folder: Path, shard: dict[str, Any] | None) -> bool:
    if shard is None:
        return False
    path = folder / shard["file"]
    return path.exists() and sha256(path) == shard["sha256"]


def _note(folder: Path, name: str) -> Path:
    """Where a process notes a shard that is done, until all are."""
    return folder / f"{name}.json"


def _read_note(folder: Path, name: str) -> dict[str, Any] | None:
    try:
        return json.loads(_note(folder, name).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
