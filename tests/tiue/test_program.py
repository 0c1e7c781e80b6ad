"""What `tiue export` writes down, called as it is, against the pipeline that it is made of."""

import torch
from diffusers import EulerDiscreteScheduler

from tests.tiue.tiny import TEXT_DIM, TEXT_LENGTH, tiny_pipeline, tiny_scheduler
from tiue import TiUEPipeline
from tiue.pipelines import program


def test_the_exported_function_draws_what_the_pipeline_draws(monkeypatch):
    """Euler scales noise by 14.6 and the model's input by less: the program does both."""
    monkeypatch.setattr(program, "export", lambda function, *_: function)  # tracing takes seconds
    pipe = TiUEPipeline.from_pipe(tiny_pipeline(scheduler=tiny_scheduler(EulerDiscreteScheduler)))
    pipe.set_progress_bar_config(disable=True)
    draw = program.export_pipeline(pipe, batch=2, num_decoder_steps=3)
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(2, 4, 8, 8, generator=generator)
    text = torch.randn(2, TEXT_LENGTH, TEXT_DIM, generator=generator)
    arguments = {"prompt_embeds": text, "latents": noise, "num_decoder_steps": 3}
    want = pipe(**arguments, output_type="pt").images
    torch.testing.assert_close(draw(noise, text), want, rtol=0, atol=2e-5)
