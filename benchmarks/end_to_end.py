"""What a CPU user would take instead, end to end: token ids to a picture of 512 x 512.

`python -m benchmarks.end_to_end` runs each row in a process of its own, one after the other, and
writes `end_to_end.json` into this machine's results as each is done: seconds a picture, resident
memory while drawing and while it was being made ready. Rows named on the command line run alone,
and the others' figures stay. Weights are random, of Stable Diffusion 1.5's size; `--vae tiny`
(TAESD's size) takes a second where the full one takes as long as the UNet.

stable-diffusion.cpp (`pip install stable-diffusion-cpp-python`) loads the same weights in float16
from a folder that the row writes; its text encoder and its VAE are its own.
"""

from __future__ import annotations

import importlib.util
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from diffusers import AutoencoderKL, AutoencoderTiny

from benchmarks.forms import rivals
from benchmarks.forms.models import draw_parameters
from benchmarks.forms.rivals import NotRunError, Setting
from benchmarks.measure.machine import describe, slug, without_paths
from benchmarks.measure.markdown import seconds as format_seconds
from benchmarks.measure.markdown import table
from benchmarks.measure.race import Case
from benchmarks.peak_memory import CLEAR, resident
from tiue.files import write_json

CPU = torch.device("cpu")
Draw = Callable[[], object]


@dataclass(frozen=True)
class Row:
    """One row of the table.

    Attributes:
        form: a key of `rivals.FORMS`, one in OpenVINO, or a weight type of stable-diffusion.cpp.
        meaning: one line for the report.
        threads: of torch, OpenVINO and stable-diffusion.cpp; None for as many as there are cores.
        batch: pictures at once.
        processes: that draw at the same time, each its own.
    """

    form: str
    meaning: str
    threads: int | None = None
    batch: int = 1
    processes: int = 1


ROWS = {
    "tiue": Row("tiue", "this package, eager, K = 4"),
    "published": Row("published", "the published form, eager, K = 4"),
    "one-step": Row("one-step", "the whole UNet once, eager"),
    "one-step-inductor": Row("one-step-inductor", "the same under torch.compile"),
    "one-step-openvino": Row("one-step-openvino", "the same in OpenVINO, float32"),
    "one-step-openvino-int8": Row("one-step-openvino-int8", "the same, weights in int8 (NNCF)"),
    "published-openvino": Row("published-openvino", "the published form in OpenVINO, float32"),
    "published-openvino-int8": Row("published-openvino-int8", "the same, weights in int8 (NNCF)"),
    "tiue-openvino-int8": Row("tiue-openvino-int8", "this package in OpenVINO, weights in int8"),
    "sd-cpp-f16": Row("f16", "stable-diffusion.cpp, one step, f16"),
    "sd-cpp-q8_0": Row("q8_0", "stable-diffusion.cpp, one step, q8_0"),
    "tiue-1-thread": Row("tiue", "this package on one thread", threads=1),
    "published-1-thread": Row("published", "the published form on one thread", threads=1),
    "tiue-batch-4": Row("tiue", "this package, 4 pictures at once", batch=4),
    "tiue-batch-8": Row("tiue", "this package, 8 pictures at once", batch=8),
    "tiue-two-processes": Row(
        "tiue", "two processes at once, one thread each", threads=1, processes=2
    ),
}
# No rivals: `--scaling` asks for them.
SCALING = ("tiue-1-thread", "published-1-thread", "tiue-batch-4", "tiue-batch-8")
SCALING += ("tiue-two-processes",)
SD_CPP = ("f16", "q8_0")


def _openvino(setting: Setting, form: str) -> Draw:
    """A form's model outputs in OpenVINO, and the rest of it in torch."""
    if importlib.util.find_spec("openvino") is None:
        raise NotRunError("openvino is not installed: pip install 'tiue[int8]'")
    from tiue.compiled import OpenVINOCall

    base, _, precision = form.partition("-openvino")
    if precision and importlib.util.find_spec("nncf") is None:
        raise NotRunError("nncf is not installed: pip install 'tiue[int8]'")
    precision = precision.removeprefix("-") or "float32"
    inputs, unet = setting.inputs, setting.unet
    if base == "tiue":
        run = rivals.TiUEUNet.from_unet(unet).compile_one_pass("openvino", precision=precision)
        return lambda: run(schedule=setting.schedule, **inputs)
    if base == "published":
        module: torch.nn.Module = rivals.PublishedNoise(unet, setting.timesteps)
        noise = OpenVINOCall(module, [module], precision=precision)
        return lambda: setting.combine(noise(**inputs))
    timestep = setting.schedule.encoder_timestep

    def once(latents: torch.Tensor, prompt_embeds: torch.Tensor) -> torch.Tensor:
        return unet(latents, timestep, prompt_embeds).sample

    call = OpenVINOCall(once, [unet], precision=precision)
    return lambda: rivals.one_step(setting, call(**inputs))


def _inductor(setting: Setting) -> Draw:
    unet = setting.channels_last
    compiled = torch.compile(unet, dynamic=False)
    timestep = setting.schedule.encoder_timestep

    def run() -> object:
        inputs = setting.inputs
        out = compiled(inputs["latents"], timestep, inputs["prompt_embeds"], return_dict=False)
        return rivals.one_step(setting, out[0])

    return run


def _vae(kind: str) -> Any:
    if kind == "tiny":
        return AutoencoderTiny()
    channels = (128, 256, 512, 512)
    blocks = len(channels)
    return AutoencoderKL(
        block_out_channels=channels,
        down_block_types=("DownEncoderBlock2D",) * blocks,
        up_block_types=("UpDecoderBlock2D",) * blocks,
        layers_per_block=2,
    )


def _text_encoder() -> torch.nn.Module:
    from transformers import CLIPTextConfig, CLIPTextModel

    sizes = {"hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12}
    config = CLIPTextConfig(num_hidden_layers=12, projection_dim=768, **sizes)
    return CLIPTextModel(config).eval()


def _torch_row(row: Row, vae_kind: str) -> Draw:
    case = Case("sd15", 64, row.batch)
    setting = Setting.build(case, CPU, torch.float32)
    generator = torch.Generator().manual_seed(3)
    vae = draw_parameters(_vae(vae_kind).eval(), generator)
    text_encoder = draw_parameters(_text_encoder(), generator)
    ids = torch.randint(49000, (row.batch, 77), generator=generator)
    if "-openvino" in row.form:
        run = _openvino(setting, row.form)
    elif row.form == "one-step-inductor":
        run = _inductor(setting)
    else:
        run = rivals.FORMS[row.form].build(setting)

    @torch.no_grad()
    def draw() -> object:
        text_encoder(ids)  # the UNet's random text is already of unit size
        return vae.decode(run()).sample

    return draw


def _stable_diffusion_cpp(row: Row, vae_kind: str, folder: Path) -> Draw:
    if importlib.util.find_spec("stable_diffusion_cpp") is None:
        raise NotRunError("not installed: pip install stable-diffusion-cpp-python")
    from stable_diffusion_cpp import StableDiffusion

    unet = Setting.build(Case("sd15", 8), CPU, torch.float32).unet
    generator = torch.Generator().manual_seed(3)
    parts = {"unet": unet, "vae": _vae("kl"), "text_encoder": _text_encoder()}
    for name, model in parts.items():
        if name != "unet":
            draw_parameters(model, generator)
        model.half().save_pretrained(folder / name)
    del unet, parts
    settings: dict[str, Any] = {}
    if vae_kind == "tiny":
        draw_parameters(_vae("tiny"), generator).half().save_pretrained(folder / "taesd")
        settings["taesd_path"] = str(folder / "taesd" / "diffusion_pytorch_model.safetensors")
    model = StableDiffusion(
        model_path=str(folder),
        wtype=row.form,
        n_threads=row.threads or torch.get_num_threads(),
        verbose=False,
        **settings,
    )

    def draw() -> object:
        images = model.generate_image(
            prompt="red apple", width=512, height=512, sample_steps=1, cfg_scale=1.0, seed=0
        )
        if not images:
            raise NotRunError("it drew no picture")
        return images

    return draw


def measure(name: str, vae: str, rounds: int) -> dict[str, Any]:
    """One row, in this process.

    Args:
        name: a key of `ROWS`.
        vae: "tiny" or "kl".
        rounds: pictures that are timed, after one that is not.

    Returns:
        Seconds a picture by round, and bytes.

    Raises:
        NotRunError: it cannot run here.
    """
    row = ROWS[name]
    if row.threads:
        torch.set_num_threads(row.threads)
    with tempfile.TemporaryDirectory() as folder:
        begin = time.perf_counter()
        if row.form in SD_CPP:
            draw = _stable_diffusion_cpp(row, vae, Path(folder))
        else:
            draw = _torch_row(row, vae)
        draw()
        ready = time.perf_counter() - begin
        making = resident("VmHWM")
        CLEAR.write_text("5")
        seconds = []
        for _ in range(rounds):
            begin = time.perf_counter()
            draw()
            seconds.append(round((time.perf_counter() - begin) / row.batch, 3))
    return {
        "seconds": seconds,
        "ready_s": round(ready, 1),
        "peak_mib": resident("VmHWM") >> 20,
        "peak_making_mib": making >> 20,
    }


def in_processes(name: str, vae: str, rounds: int, minutes: float) -> dict[str, Any]:
    """One row, in as many processes as it has, or why it did not run."""
    command = [sys.executable, "-m", "benchmarks.end_to_end", name, f"--vae={vae}"]
    command += [f"--rounds={rounds}", "--here"]
    root, row = Path(__file__).parents[1], ROWS[name]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    running = [
        subprocess.Popen(command, cwd=root, text=True, **pipes)  # type: ignore[call-overload]
        for _ in range(row.processes)
    ]
    found = []
    for process in running:
        try:
            output, errors = process.communicate(timeout=60 * minutes)
        except subprocess.TimeoutExpired:
            for other in running:
                other.kill()
            return asdict(row) | {"not_run": f"more than {minutes:g} minutes"}
        lines = [line for line in output.splitlines() if line.startswith("{")]
        if process.returncode or not lines:
            last = (errors.strip().splitlines() or [f"exit status {process.returncode}"])[-1]
            reason = without_paths(f"{last} (exit status {process.returncode})")
            return asdict(row) | {"not_run": reason}
        found.append(json.loads(lines[-1]))
    if any("not_run" in one for one in found):
        return asdict(row) | found[0]
    both = {key: sum(one[key] for one in found) for key in ("peak_mib", "peak_making_mib")}
    seconds = [second / row.processes for one in found for second in one["seconds"]]
    return asdict(row) | found[0] | both | {"seconds": seconds}


def section(results: list[dict[str, Any]]) -> Iterator[str]:
    """The table of every device's end_to_end.json.

    Args:
        results: What `main` wrote.

    Yields:
        Paragraphs and tables of Markdown.
    """
    if not results:
        yield "Not measured: `python -m benchmarks.end_to_end`, and `--scaling`."
    for result in results:
        yield (
            f"{result['machine_info']['device']}, torch {result['machine_info']['torch']}. Token "
            "ids to a picture of 512 x 512, random weights of Stable Diffusion 1.5's size, a row a "
            "process. Memory is all that is resident, weights included: while drawing, and before."
        )
        lines = []
        for row in result["rows"].values():
            if "not_run" in row:
                lines.append([row["meaning"], row["vae"], f"not run: {row['not_run']}", "", "", ""])
                continue
            times = sorted(row["seconds"])
            lines.append(
                [
                    row["meaning"],
                    row["vae"],
                    format_seconds(statistics.median(times)),
                    f"{format_seconds(times[0])} to {format_seconds(times[-1])}",
                    f"{row['peak_mib']:,} MiB",
                    f"{row['peak_making_mib']:,} MiB, {row['ready_s']:.0f} s",
                ]
            )
        header = ["what", "VAE", "a picture", "range", "memory", "making it ready"]
        yield table(header, lines)


def main(
    rows: Annotated[list[str] | None, typer.Argument(help="By default all but scaling.")] = None,
    vae: Annotated[str, typer.Option(help="tiny or kl.")] = "tiny",
    rounds: Annotated[int, typer.Option(min=1, help="Pictures timed, after one that is not.")] = 2,
    minutes: Annotated[float, typer.Option(min=0.1, help="At most for a row.")] = 3,
    scaling: Annotated[bool, typer.Option("--scaling", help="Threads, batches.")] = False,
    here: Annotated[bool, typer.Option("--here", hidden=True)] = False,
    output: Annotated[Path | None, typer.Option(help="By default this machine's results.")] = None,
) -> None:
    """Measure rows, each in a process of its own, and write each as it is done."""
    chosen = rows or [name for name in ROWS if (name in SCALING) == scaling]
    if unknown := [name for name in chosen if name not in ROWS]:
        raise typer.BadParameter(f"no row {unknown[0]!r}: choose of {', '.join(ROWS)}")
    if here:
        try:
            print(json.dumps(measure(chosen[0], vae, rounds)))
        except NotRunError as error:
            print(json.dumps({"not_run": str(error)}))
        return
    results = Path(__file__).parent / "results" / slug(CPU)
    path = output or results / "end_to_end.json"
    found: dict[str, Any] = json.loads(path.read_text("utf-8")) if path.exists() else {"rows": {}}
    for name in chosen:
        figures = in_processes(name, vae, rounds, minutes)
        found["machine_info"] = describe(CPU)
        found["rows"][name] = figures | {"vae": vae}
        found["rows"] = {known: found["rows"][known] for known in ROWS if known in found["rows"]}
        write_json(path, found)
        print(name, figures.get("not_run") or figures["seconds"], flush=True)


if __name__ == "__main__":
    typer.run(main)
