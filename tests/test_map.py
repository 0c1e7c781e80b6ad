"""The map of CONTRIBUTING.md is true: what each row knows, and that nothing goes in a circle."""

from __future__ import annotations

import ast
import functools
import re
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest
import torch

from tests.tiue.unets import make_inputs, make_unet
from tiue import TiUEUNet

ROOT = Path(__file__).parents[1]
OURS = ("tiue", "tiue_kernels", "testing", "benchmarks", "tests")
LATER = "; inside functions:"  # before it what is imported with a module, after it what is not
# Open to every row above them: errors, files, layouts.
GROUND = ("tiue/errors.py", "tiue_kernels/layout.py")
# What closes a circle at a call: the choice of a backend asks the compiled library, which is made
# of the table, whether it can; a command calls its parts.
CLOSED_AT_A_CALL = {
    ("tiue_kernels.dispatch", "tiue_kernels.cuda"),
}


def paths() -> dict[str, Path]:
    """Every module of the repository by its name."""
    found = {}
    for folder in OURS:
        for path in (ROOT / folder).rglob("*.py"):
            parts = path.relative_to(ROOT).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


PATHS = paths()


@functools.cache
def imports(path: Path) -> tuple[tuple[str, bool], ...]:
    """What a file imports, modules of ours by their names and others by their first word.

    The second is whether it is imported inside a function, that is when it is called.
    """

    def visit(node: ast.AST, inside: bool) -> Iterator[tuple[str, bool]]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
                continue
            if isinstance(child, ast.Import):
                names = [alias.name for alias in child.names]
            elif isinstance(child, ast.ImportFrom):
                names = [f"{'.' * child.level}{child.module}.{alias.name}" for alias in child.names]
            else:
                names = []
            for name in names:
                first = name.split(".")[0]
                while first in OURS and name not in PATHS:
                    name = name.rpartition(".")[0]  # a function or class of a module
                if first not in sys.stdlib_module_names:
                    yield name if first in OURS else first, inside
            function = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
            yield from visit(child, inside or function)

    return tuple(visit(ast.parse(path.read_text(encoding="utf-8")), False))


@dataclass(frozen=True)
class Row:
    """A row of the map: its folders and files, and what it knows with a module and later."""

    places: tuple[str, ...]
    knows: frozenset[str]
    later: frozenset[str]


def read_map(text: str) -> list[Row]:
    table = text.split("| folder | what it is | knows |\n")[1].split("\n\n")[0]
    rows = []
    for line in table.splitlines()[1:]:
        places, _, knows = (cell.strip() for cell in line.strip("|").split(" | "))
        knows, _, later = knows.partition(LATER)
        first, second = (frozenset(re.findall(r"`([^`]+)`", cell)) for cell in (knows, later))
        rows.append(Row(tuple(re.findall(r"`([^`]+)`", places)), first, first | second))
    return rows


ROWS = read_map((ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8"))


def covers(place: str, file: str) -> bool:
    return file.startswith(place) if place.endswith("/") else file == place


@functools.cache
def place_of(name: str) -> str:
    """The most particular place of the map that a module of ours lies in."""
    file = str(PATHS[name].relative_to(ROOT))
    fitting = [place for row in ROWS for place in row.places if covers(place, file)]
    assert fitting, f"{file} is in no row of CONTRIBUTING.md's map: add it, with what it knows"
    return max(fitting, key=len)


def row_of(name: str) -> Row:
    place = place_of(name)
    return next(row for row in ROWS if place in row.places)


def allows(known: Iterable[str], row: Row, name: str) -> bool:
    """Whether a row knows a library or a module of ours."""
    if name.split(".")[0] not in OURS:
        return name in known
    other = row_of(name)
    if other is row or any(place in other.places for place in GROUND):
        return True
    file = str(PATHS[name].relative_to(ROOT))
    return any(covers(place, file) for place in known)


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.places[0])
def test_a_row_knows_what_the_map_says_and_no_more(row: Row) -> None:
    assert all((ROOT / place).exists() for place in row.places)
    broken, used = set(), set()
    for name, path in PATHS.items():
        if row_of(name) is not row:
            continue
        for target, inside in imports(path):
            known = row.later if inside else row.knows
            if not allows(known, row, target):
                broken.add(f"{path.relative_to(ROOT)} imports {target}")
            used |= {entry for entry in known if allows({entry}, row, target)}
    assert broken == set()
    assert {entry for entry in row.later if entry not in used} == set(), "known for nothing"


def sort(graph: dict[str, set[str]]) -> None:
    """Raises where there is a circle, which it names."""
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        raise AssertionError(f"a circle: {' <- '.join(error.args[1])}") from None


def graph(with_functions: bool) -> dict[str, set[str]]:
    return {
        name: {
            target
            for target, inside in imports(path)
            if target in PATHS and target != name and (with_functions or not inside)
        }
        for name, path in PATHS.items()
    }


def test_modules_import_one_another_in_no_circle() -> None:
    sort(graph(with_functions=False))


def test_functions_close_no_circle_but_the_named_ones() -> None:
    edges = graph(with_functions=True)
    for name, target in CLOSED_AT_A_CALL:
        edges[name].remove(target)
    sort(edges)


def test_rows_of_the_map_know_one_another_in_no_circle() -> None:
    rows: dict[str, set[str]] = {}
    for name, targets in graph(with_functions=False).items():
        own = row_of(name).places[0]
        others = {row_of(target).places[0] for target in targets} - {own}
        rows.setdefault(own, set()).update(others)
    sort(rows)


@torch.no_grad()
def test_a_skip_goes_from_decoder_to_kernel_through_six_rooms() -> None:
    """What CONTRIBUTING says of the walk: the rows of the map on the stack of a launcher."""
    unet = TiUEUNet.from_unet(make_unet("sd1"))
    names = {str(path): name for name, path in PATHS.items()}
    walks: list[tuple[str, ...]] = []

    def note(frame, event: str, _arg) -> None:
        if event != "call" or frame.f_code.co_name != "shared_skip_group_norm_silu_fwd":
            return
        rooms: list[str] = []
        while frame is not None and frame.f_code.co_name != "decode_up_block":
            name = names.get(frame.f_code.co_filename)
            if name is not None and (not rooms or rooms[-1] != row_of(name).places[0]):
                rooms.append(row_of(name).places[0])
            frame = frame.f_back
        if frame is not None:  # the encoder's resnets have no skip
            walks.append(tuple(reversed(rooms)))

    sys.setprofile(note)
    try:
        inputs = make_inputs()
        unet.predict_noise(inputs["latents"], [751, 1], inputs["prompt_embeds"])
    finally:
        sys.setprofile(None)
    kernels = ("nn/", "functional/", "ops/", "dispatch.py", "reference/")
    assert set(walks) == {("tiue/unet.py", *(f"tiue_kernels/{room}" for room in kernels))}


def test_a_circle_and_an_unknown_import_would_be_noticed(tmp_path) -> None:
    with pytest.raises(AssertionError, match=r"a circle: (a <- b|b <- a)"):
        sort({"a": {"b"}, "b": {"a"}})
    file = tmp_path / "x.py"
    file.write_text("import triton\ndef f():\n    from tiue import unet, schedule\n")
    expected = (("triton", False), ("tiue.unet", True), ("tiue.schedule", True))
    assert imports(file) == expected
    kernels = row_of("tiue_kernels.reference.geglu")
    assert allows(kernels.knows, kernels, "torch")
    assert not allows(kernels.later, kernels, "triton")
    assert not allows(kernels.later, kernels, "tiue_kernels.dispatch")
