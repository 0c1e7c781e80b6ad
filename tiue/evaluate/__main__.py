"""`python -m tiue.evaluate` and `accelerate launch -m tiue.evaluate`: as `tiue evaluate`."""

import sys

from tiue.cli import app

if __name__ == "__main__":
    app(["evaluate", *sys.argv[1:]], prog_name="python -m tiue")
