"""Writes docs/miniature.md from benchmarks/results/miniature; no number of it is typed by hand."""

from __future__ import annotations

import json
import statistics
from typing import Any

from benchmarks.measure.markdown import table
from benchmarks.miniature import parts, training
from benchmarks.miniature.evaluation import Results, ceilings_path, load_results, read_result
from benchmarks.miniature.plots import (
    QUALITY_IMAGE,
    SIMILARITY_IMAGE,
    draw_quality,
    draw_similarity,
)
from benchmarks.miniature.rows import (
    FAMILIES,
    PILOT_UPDATES,
    PROMPTS,
    PROTOCOL,
    RATES,
    ROOT,
    ROWS,
    SEEDS,
    SETTINGS,
    UPDATES,
    Row,
)
from benchmarks.miniature.sheets import CONTACT_IMAGE, STRIP_IMAGE
from benchmarks.miniature.verdicts import (
    AGREES,
    CLAIMS,
    DISAGREES,
    NOT_RUN,
    shown,
    values,
)
from tiue.evaluate.scenes_preset import EVERYTHING, SPLITS, split_name

PAGE = ROOT / "docs" / "miniature.md"
# The summary's columns: figures over all prompts.
SUMMARY = {
    "right": "all right",
    "coverage": "coverage",
    "entropy": "entropy",
    "energy": "energy distance",
    "diversity": "LPIPS diversity",
}
BY_SPLIT = {
    "right": "All right, by level",
    "coverage": "Coverage, by level",
    "energy": "Energy distance, by level",
}
SPLIT_NAMES = [*(split_name(*split) for split in SPLITS), EVERYTHING]


def main_rows() -> list[Row]:
    """The rows of the tables: pilots have one of their own."""
    return [row for row in ROWS.values() if not row.is_pilot]


def named(row: Row) -> str:
    """A row as tables name it."""
    return f"{row.label} (`{row.name}`)"


def updates_told(row: Row, results: list[dict[str, Any]]) -> tuple[str, str]:
    """A student's updates and learning rate: those it was trained with, or is to be."""
    if row.training is None:
        return "", ""
    if results:
        facts = results[0]["model"]["training"]
        return str(facts["steps"]), f"{facts['learning_rate']:g}"
    return str(training.updates_of(row)), ""


def summary_rows(results: Results, ceilings: Results, costs: dict[str, Any]) -> list[list[str]]:
    """Lines of the first table: every row, `not run` where there is no result."""
    lines = [
        [side, "", "", "", *(shown(values(own, figure), figure) for figure in SUMMARY), "", "", ""]
        for side, own in ceilings.items()
    ]
    for row in main_rows():
        if row.missing:
            continue
        own, cost = results.get(row.name, []), costs.get(row.name, {})
        updates, rate = updates_told(row, own)
        figures = [shown(values(own, figure), figure) for figure in SUMMARY]
        compute = f"{cost['update'] * int(updates) / 1e12:.1f} T" if "update" in cost else ""
        lines.append(
            [
                named(row),
                str(len(own)),
                updates,
                rate,
                *(figures if own else [NOT_RUN] * len(SUMMARY)),
                compute,
                f"{cost['multiply_adds'] / 1e6:.0f} M" if cost else "",
                f"{1e3 * cost['seconds']:.0f} ms" if "seconds" in cost else "",
            ]
        )
    return lines


HEADER = [
    *("row", "seeds", "updates", "learning rate", *SUMMARY.values()),
    *("training compute", "multiply-adds", "time"),
]


def split_rows(results: Results, ceilings: Results, figure: str) -> list[list[str]]:
    """Lines of the table of one figure by level, seen or held out: rows that have a result."""
    lines = [
        [side, *(shown(values(own, figure, split), figure) for split in SPLIT_NAMES)]
        for side, own in ceilings.items()
    ]
    for row in main_rows():
        if own := results.get(row.name):
            cells = [shown(values(own, figure, split), figure) for split in SPLIT_NAMES]
            lines.append([named(row), *cells])
    return lines


def claim_rows(results: Results, similarity: dict[str, Any] | None) -> list[list[str]]:
    """Every claim, its rule, the verdict, and what that stands on."""
    lines = []
    for claim in CLAIMS:
        verdict, evidence = claim.judge(results)
        lines.append([claim.claim, claim.needs, verdict, evidence])
    verdict, evidence = NOT_RUN, ""
    if similarity is not None:
        means = [statistics.fmean(similarity[p]["changes"]) for p in ("encoder", "decoder")]
        verdict = AGREES if means[0] < means[1] else DISAGREES
        evidence = f"mean relative change {means[0]:.4f} (encoder), {means[1]:.4f} (decoder) a step"
    text = "the encoder's features change less between timesteps than the decoder's"
    return [*lines, [text, "less", verdict, evidence]]


def pilot_rows() -> list[list[str]]:
    """Lines of the pilots' table: energy distances, and the rate that was chosen."""
    path = training.rates_path()
    found = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    if found.get("teacher_sha256") != training.teacher_sha256():
        found = {}
    lines = []
    for family in FAMILIES:
        energies = found.get("energy", {}).get(family, {})
        known = [energies.get(rate) for rate in RATES]
        cells = [NOT_RUN if energy is None else f"{energy:.3f}" for energy in known]
        lines.append([f"K = {family[1:]}", *cells, found.get("rates", {}).get(family, NOT_RUN)])
    return lines


def load_ceilings() -> Results:
    """The figures of true pictures, and of those through the autoencoder, as results."""
    if not ceilings_path().exists():
        return {}
    splits = read_result(ceilings_path())["scenes"]["splits"]
    return {side: [{"scenes": {"splits": {"model": own}}}] for side, own in splits.items()}


def protocol_text() -> list[str]:
    """What was decided before a row ran."""
    return [
        f"**Protocol.** Students are distilled from the shipped teacher by `tiue distill` and the"
        f" recipe `scenes` (teacher guided by {SETTINGS['guidance_scale']:g}, batch"
        f" {SETTINGS['batch_size']}), but for the LoRA teacher, which is not guided, and the KL"
        f" term, which is off where a row does not name it: {UPDATES} updates, on {PROMPTS:,}"
        " prompts of the grammar of which none is held out. K = 1 has trailing spacing (t = 999):"
        " the last step of leading spacing, which K = 2, 4 and 8 have as their teacher, is t = 1,"
        " where nothing is left to do. `k4-trailing` is there to tell the two apart. One step of"
        " the teacher, trailing, is `one-pass-1`. Three training"
        f" seeds a row ({', '.join(map(str, SEEDS))}), each with the noise of the same number. The"
        " learning rate is that of K = 1 or of K = 4 (for 2 and 8 too): of pilots of"
        f" {PILOT_UPDATES} updates and one seed, the one of the least energy distance. The KL term"
        " holds each predicted noise map near a normal distribution, so K = 1 has one as well; it"
        " is a sum over maps, of which K = 4 has four times as many.",
        f"**Figures.** `tiue evaluate --preset scenes`: {PROTOCOL.summary} *All right*: everything"
        " that the prompt names, and nothing else, is there. *Coverage*: of what the prompt leaves"
        " open, the different values that are shown rightly, over those of as many true scenes."
        " *Entropy* likewise, in bits, right or wrong. *Energy distance*: of the judge's features,"
        " from true scenes of the same prompt, over their distance from one another; 0 is equal,"
        " less is better. Mean and standard"
        " deviation over seeds.",
        "**Compute.** An update is the student forward and backward at its K, the guided teacher,"
        " the LoRA teacher, and the LoRA's own step; its products are counted, backward as two of"
        " the forward where weights are trained. `k1-compute` has as many updates as make K = 4's"
        " training compute. Multiply-adds of a picture are of the UNet, guidance included, text"
        " encoder and autoencoder left out.",
        "**Verdicts.** The claims below and their rules were written before the first row ran"
        " (`benchmarks/miniature/verdicts.py`). `undecided`: the means of the two rows differ by"
        " less than two standard errors over their training seeds; `not run`: a row has not all of"
        " them. Three seeds are few: where nothing differs, chance alone decides between one"
        " comparison in nine and one in five (Student's t, 4 and 2 degrees of freedom).",
    ]


def similarity_text(similarity: dict[str, Any]) -> str:
    """What was compared, and how alike the student's predictions are."""
    text = (
        f"Teacher, {similarity['steps']} steps, guidance {similarity['guidance_scale']:g},"
        f" {similarity['prompts']} prompts; every down block and the mid block against every up"
        " block, features of the half with the prompt.\n\n"
        f"![Similarity against timestep](images/{SIMILARITY_IMAGE})"
    )
    student = similarity["student"]
    if student is None:
        return text
    others = [student["cosines"][a][b] for a in range(len(student["cosines"])) for b in range(a)]
    weights = ", ".join(f"{value:.3f}" for value in student["noise_coefficients"])
    return text + (
        f"\n\nThe predictions of the K = 4 student (timesteps"
        f" {', '.join(map(str, student['timesteps']))}; weights {weights}) have a mean cosine of"
        f" {statistics.fmean(others):.4f} with one another, {min(others):.4f} at least."
    )


def strip_text(strip: dict[str, Any]) -> str:
    """The strip, and how much each term is."""
    header = ["term's root mean square", *(f"t = {t}" for t in strip["timesteps"])]
    lines = [[side, *(f"{v:.3f}" for v in own)] for side, own in strip["rms"].items()]
    return (
        f"S z, then the sum after each timestep; S = {strip['latent_coefficient']:.3f}. The teacher"
        " is guided, and not distilled. What leaving one out costs stands in the tables"
        " (`k4-without-...`).\n\n"
        f"![What each timestep adds](images/{STRIP_IMAGE})\n\n{table(header, lines)}"
    )


def page(results: Results) -> str:
    """The page's text; draws its plots."""
    costs = parts.load_part(parts.COSTS)
    similarity = parts.load_part(parts.SIMILARITY)
    strip, contact = parts.load_part(parts.STRIP), parts.load_part(parts.CONTACT)
    own_costs, ceilings = (costs or {}).get("rows", {}), load_ceilings()
    sections = [
        "# The experiment: what decoding at four timesteps buys",
        "`python -m benchmarks.miniature report` writes this page from"
        " `benchmarks/results/miniature/`; do not edit it. `... train ROW` and `... evaluate ROW`"
        " make results, `... rates`, `... costs`, `... similarity`, `... strip` and `... contact`"
        " the rest; what has none says `not run`. On the scenes model, whose teacher has to draw;"
        " what the paper's claims are worth on the OpenMoji model, which needs no distilling, is in"
        " [its card](../tiue/openmoji/MODEL_CARD.md).",
        *protocol_text(),
        "## Verdicts",
        table(["claim", "rule", "verdict", "figures"], claim_rows(results, similarity)),
        "## Quality and cost",
        table(HEADER, summary_rows(results, ceilings, own_costs)),
        "Time is the median CPU time of one picture on one thread, text encoder and autoencoder"
        " included"
        + (f", on {costs['machine']['device']}" if costs else "")
        + "; students of one K cost the same, and one of them is timed.",
    ]
    if draw_quality(results, own_costs):
        sections.append(
            f"![Coverage against accuracy](images/{QUALITY_IMAGE})\n\nA point's area is its"
            " multiply-adds a picture."
        )
    for figure, title in BY_SPLIT.items() if results else ():
        sections += [f"### {title}", table(["row", *SPLIT_NAMES], split_rows(
            results, ceilings, figure))]  # fmt: skip
    sections += [
        "## Learning rates",
        table(["energy distance at", *RATES, "chosen"], pilot_rows()),
        "## What each timestep adds",
        "Not run." if strip is None else strip_text(strip),
        "## One prompt, eight times",
        "Not run."
        if contact is None
        else f"The same eight seeds by each.\n\n![One prompt, eight times](images/{CONTACT_IMAGE})",
        "## Features across timesteps",
    ]
    if similarity is None:
        sections.append("Not run.")
    else:
        draw_similarity(similarity)
        sections.append(similarity_text(similarity))
    sections += [
        "## Not run, for want of code",
        "\n".join(f"- {named(row)}: {row.missing}" for row in ROWS.values() if row.missing),
    ]
    return "\n\n".join(sections) + "\n"


def write() -> None:
    """Write the page and its plots."""
    PAGE.write_text(page(load_results()), encoding="utf-8")
