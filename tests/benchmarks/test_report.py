"""The report says what the results hold, no more, from results that the test makes up."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import multiply_adds
from benchmarks.measure import counted
from benchmarks.report import performance, plots

MACHINE = {"device": "Some CPU, 2 cores", "torch": "2.13.0"}


def row(case: str, form: str, median: float, **info) -> dict:
    facts = {"dtype": "float32", "model": "sd15", "latent_size": 64, "batch": 1}
    facts |= {"num_decoder_steps": 4, "case": case, "form": form}
    stats = {"median": median, "min": 0.9 * median, "max": 1.5 * median, "rounds": 5}
    return {"stats": stats, "extra_info": facts | info}


def result(*rows: dict) -> dict:
    return {
        "machine_info": MACHINE,
        "commit_info": {"id": "0123456789abcdef", "dirty": True},
        "datetime": "2026-11-23T12:00:00",
        "benchmarks": list(rows),
    }


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(performance, "COUNTED", {"tiny": 8})
    (tmp_path / "docs").mkdir()
    (tmp_path / "benchmarks" / "results" / "cpu").mkdir(parents=True)
    (tmp_path / "README.md").write_text(
        f"before\n{performance.START}\nold\n{performance.END}\nafter\n"
    )
    return tmp_path


def write(root: Path, name: str, content: dict) -> None:
    (root / "benchmarks" / "results" / "cpu" / name).write_text(json.dumps(content))


def page(root: Path) -> str:
    performance.main(root)
    return (root / "docs" / "performance.md").read_text()


def section(text: str, title: str) -> str:
    return text.split(f"\n## {title}\n")[1].split("\n## ")[0]


def line(text: str, *words: str) -> str:
    (found,) = (own for own in text.splitlines() if all(word in own for word in words))
    return found


SHARES = {"convolution": 0.5, "attention": 0.2, "linear": 0.2, "rest": 0.1}


def one_pass() -> dict:
    facts = {
        "not_run": {"tiue-openvino": "no such form yet"},
        "matmul_tflop_s": 0.2,
        "winograd": True,
        "peaks_mib": {"published": 1000.0, "tiue": 900.0, "tiue-direct": 650.0},
        "peak_of": "growth of a process",
    }
    return result(
        row("case", "published", 24.0, **facts, multiply_adds=1.2e12, gmac_s=50.0),
        row("case", "published-openvino", 18.0, **facts, relative_difference=3e-6),
        row("case", "one-step", 9.0, **facts),
        row("case", "tiue", 12.0, **facts, relative_difference=4e-5, time_shares=SHARES),
    )


def test_without_results_every_section_says_so(root: Path) -> None:
    text = page(root)
    for title in (
        *("One pass", "Against K, batch and resolution", "Blocks", "Training step"),
        *("The embedded model", "Transformers", "GPU", "Where we lose"),
        *("Kernels and bytes on a GPU, without one", "What the host does"),
    ):
        assert performance.NOT_MEASURED in section(text, title)
    assert performance.NOTHING in (root / "README.md").read_text()
    # What needs no clock is there all the same.
    counted = section(text, "Multiply-adds, without a clock")
    for words in multiply_adds.rows("tiny", 8):
        assert f"| {' | '.join(words)} |" in counted


def test_what_is_counted_stands_beside_what_it_was(root: Path) -> None:
    folder = root / "benchmarks" / "results" / "counted"
    entry = {"kernels": 1234, "read": 2e9, "written": 1e9, "kinds": {"copy": [34, 1.5e9]}}
    for name, commit, kernels in (("launches_before", "old", 1234), ("launches", "new", 999)):
        layouts = {"nchw": entry | {"kernels": kernels}, "nhwc": {"reason": "refused"}}
        figures = {"models": {"sd15": {"tiue": layouts}}}
        counted.write_result(folder / f"{name}.json", figures, commit)
    host = {"passes": {"published": 0.08, "tiue": 0.06}, "operators": {"geglu": {"eager": 1e-5}}}
    counted.write_result(folder / "host.json", host, "new")

    text = page(root)
    kernels = section(text, "Kernels and bytes on a GPU, without one")
    before, now = kernels.split("Now: commit new")
    assert "| tiue | nchw | 1,234 | 2.00 | 1.00 | 3.00 |" in before
    assert "commit old" in before
    assert "| tiue | nchw | 999 | 2.00 | 1.00 | 3.00 |" in now
    assert "| tiue | nhwc | refused |" in now
    assert "| copy | 34 | 1.50 |" in now
    assert "Goal for" not in now  # this layout was refused
    hosts = section(text, "What the host does")
    assert "| tiue | 60.0 ms | 0.75 x |" in hosts
    assert "| geglu | 10 µs |  |  |  |" in hosts
    assert "Before" not in hosts


def test_transformers(root: Path) -> None:
    parts = {"shared": {"linear": 3 * 10**9}, "decoder": {"linear": 8 * 10**9, "attention": 10**9}}
    entry = {"multiply_adds": parts, "kernels": 1234, "read": 2e9, "written": 1e9}
    forms = {"repeated": entry | {"saved": 2**30}, "one-step": entry}
    folder = root / "benchmarks" / "results" / "counted"
    counted.write_result(folder / "transformers.json", {"models": {"pixart": forms}}, "new")
    timed = [row("decoder", form, seconds) for form, seconds in (("repeated", 6.0), ("tiue", 5.0))]
    write(root, "bench_transformer.json", result(*timed))
    text = section(page(root), "Transformers")
    assert "| repeated | 3.0 | 9.0 | 12.0 | 1.00 x | 1,234 | 3.00 | 1,024 |" in text
    assert "| one-step | 3.0 | 9.0 | 12.0 | 1.00 x | 1,234 | 3.00 |  |" in text
    assert "1.20 x" in line(text, "| decoder, float32 | tiue |")


def test_one_pass(root: Path) -> None:
    write(root, "bench_one_pass.json", one_pass())
    text = section(page(root), "One pass")
    assert "Commit 0123456789ab with uncommitted changes, 2026-11-23" in text
    assert "| 12.00 s | 10.80 s to 18.00 s | 5 | 2.00 x | 4.0e-05 |" in line(text, "| tiue |")
    # 50 GMAC/s are 0.1 TFLOP/s, half of the product's 0.2.
    assert "| 1200 G | 50% | 1000 MiB |" in line(text, "| published |")
    assert "published 1000 MiB, tiue 900 MiB (0.90 x), tiue-direct 650 MiB (0.65 x)" in text
    assert "- Not run: tiue-openvino. no such form yet." in text
    assert "convolution 50%, attention 20%, linear 20%, rest 10%" in line(text, "Time of tiue")
    assert "Winograd's where that is faster" in text


def test_forms_with_a_lora_are_held_against_the_published_form_with_it(root: Path) -> None:
    forms = (row("case", "published-lora", 20.0), row("case", "tiue-lora", 12.5))
    write(root, "bench_one_pass_lora.json", result(*forms))
    assert "| 1.60 x |" in line(section(page(root), "One pass"), "| tiue-lora |")


def test_where_we_lose_holds_our_best_against_each_rival(root: Path) -> None:
    write(root, "bench_one_pass.json", one_pass())
    slow = row("resnet", "published", 1.0), row("resnet", "tiue", 1.5)
    write(root, "bench_block.json", result(*slow))
    text = section(page(root), "Where we lose")
    assert "one-step takes 9.00 s, tiue 12.00 s, 1.33 x as long" in text
    assert "published takes 1.00 s, tiue 1.50 s, 1.50 x as long" in text
    assert "published-openvino" not in text
    assert len(text.strip().splitlines()) == 2


def test_where_we_lose_holds_memory_too(root: Path) -> None:
    losing = one_pass()
    for entry in losing["benchmarks"]:
        entry["extra_info"]["peaks_mib"] = {"published": 1000.0, "tiue": 1500.0}
    write(root, "bench_one_pass.json", losing)
    text = section(page(root), "Where we lose")
    assert "memory over the weights, published 1000 MiB, tiue 1500 MiB, 1.50 x." in text


def test_readme_has_the_figures(root: Path) -> None:
    write(root, "bench_one_pass.json", one_pass())
    page(root)
    readme = (root / "README.md").read_text()
    assert (
        "| Some CPU, 2 cores | `pip install .` with a C++ compiler | 24.00 s | 18.00 s | 12.00 s "
        "| 2.00 x | 1000 MiB | 900 MiB |" in readme
    )
    assert "1,026 G multiply-adds for one pass at K = 4, the published form 1,216 G" in readme
    assert readme.startswith("before\n")
    assert readme.endswith("after\n")
    with pytest.raises(ValueError, match="markers"):
        performance.replace_block("no markers", "new")


def test_pipewordsshares(root: Path) -> None:
    stages = {"text encoder": 0.01, "encoder": 0.02, "decoder": 0.04, "VAE": 0.02, "rest": 0.01}
    write(root, "bench_pipeline.json", result(row("a picture", "tiue", 0.1, stages_s=stages)))
    text = section(page(root), "The embedded model")
    assert "| 1 | 100.00 ms | 10% | 20% | 40% | 20% | 10% |" in text


def test_training_step(root: Path) -> None:
    rows = (
        row("case", "published", 4.0, saved_mib=200.0),
        row("case", "tiue", 3.0, saved_mib=100.0, keeps_freed_memory=True),
    )
    write(root, "bench_train_step.json", result(*rows))
    text = section(page(root), "Training step")
    assert "1.33 x" in line(text, "| tiue |")
    assert "counted, not timed): published 200 MiB, tiue 100 MiB." in text
    assert "The process kept the memory that it freed, for every form alike" in text


def test_plots_are_of_what_varies(root: Path) -> None:
    sweep = [
        row(f"K = {k}", form, seconds * k, num_decoder_steps=k)
        for k in (1, 2, 4)
        for form, seconds in (("published", 3.0), ("tiue", 2.0))
    ]
    write(root, "bench_one_pass_steps.json", result(*sweep))
    write(root, "bench_one_pass.json", result(row("other", "tiue", 1.0, batch=4)))
    rows = performance.one_pass_rows(list(performance.load(root / "benchmarks" / "results")))
    held = ("Some CPU, 2 cores", "sd15", "float32", 1, 64)
    assert plots.series(rows, "num_decoder_steps") == {
        held: {"published": {1: 3.0, 2: 6.0, 4: 12.0}, "tiue": {1: 2.0, 2: 4.0, 4: 8.0}}
    }
    assert plots.series(rows, "batch") == {(*held[:3], 4, 64): {"tiue": {1: 8.0, 4: 1.0}}}
    assert plots.series(rows, "latent_size") == {}

    images = root / "docs" / "images"
    images.mkdir()
    (images / "time-against-K-of-old.png").write_bytes(b"")
    (images / "openmoji-student.png").write_bytes(b"kept")
    text = section(page(root), "Against K, batch and resolution")
    names = {link.split(")")[0] for link in text.split("](images/")[1:]}
    assert len(names) == 2
    assert {path.name for path in images.iterdir()} == names | {"openmoji-student.png"}
    assert all((images / name).read_bytes().startswith(b"\x89PNG") for name in names)


def test_roofline(root: Path) -> None:
    operator = {"operator": "geglu_feed_forward", "case": "some", "form": "tiue"}
    operator |= {"dtype": "float16", "direction": "forward", "speedup_over_eager": 0.8}
    operator |= {"flops": 10**9, "bytes": 10**7, "tflop_s": 100.0}
    ceilings = {"copy_gb_s": 3000.0, "matmul_tflop_s": {"float16": 700.0}}
    gpu = {"machine": {"device": "Some GPU"}, "ceilings": ceilings, "operators": [operator]}
    write(root, "gpu.json", gpu)
    text = page(root)
    assert "](images/roofline-some-gpu.png)" in section(text, "GPU")
    assert (root / "docs" / "images" / "roofline-some-gpu.png").exists()
    assert "geglu_feed_forward some forward, Some GPU: 0.80 x the speed of eager" in section(
        text, "Where we lose"
    )
