"""What decoding at several timesteps buys over one: the experiment on the scenes model.

`python -m benchmarks.miniature COMMAND`; docs/miniature.md is its page.
"""
