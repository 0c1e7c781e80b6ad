"""Two lengths: a bounded run with the suite, the same inputs each time, and `benchmarks.fuzz`."""

from hypothesis import HealthCheck, Phase, settings

settings.register_profile(
    "suite",
    max_examples=12,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=list(HealthCheck),
    # No shrinking: calls are small, and Triton's interpreter takes seconds under its tracer.
    phases=(Phase.explicit, Phase.generate),
)
settings.load_profile("suite")
