"""Diffusers pipelines over the one pass."""

from tiue.pipelines.pipeline_tiue import TiUEPipeline, TiUEPipelineOutput

__all__ = ["TiUEPipeline", "TiUEPipelineOutput"]
