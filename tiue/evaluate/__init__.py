"""Evaluation: pictures drawn by a printed protocol, features, metrics, one JSON.

From command to figure: `command` reads options, `protocol` says how, `generation` draws, `features`
turns pictures into points, `metrics` and `lpips` compare them, `result` writes and compares.
"""
