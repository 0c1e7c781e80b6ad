"""Diffusers pipelines over the one pass."""

from tiue.pipelines.one_pass import one_pass
from tiue.pipelines.pipeline_tiue import TiUEPipeline, TiUEPipelineOutput, TiUEXLPipeline

__all__ = ["TiUEPipeline", "TiUEPipelineOutput", "TiUEXLPipeline", "one_pass"]
