"""`python -m tiue` and `accelerate launch -m tiue`: the same as `tiue`."""

from tiue.cli import app

if __name__ == "__main__":
    app(prog_name="python -m tiue")
