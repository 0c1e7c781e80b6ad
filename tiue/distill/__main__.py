"""`python -m tiue.distill` and `accelerate launch -m tiue.distill`: the same as `tiue distill`."""

import sys

from tiue.cli import app

if __name__ == "__main__":
    app(["distill", *sys.argv[1:]], prog_name="python -m tiue")
