"""`python -m tests.absent_gpu LIBRARY`: every whole pass, one JSON object a pass."""

import sys
from pathlib import Path

from tests.absent_gpu.device import load


def main() -> None:
    load(Path(sys.argv[1]))
    from tests.absent_gpu import passes  # torch is imported after the device is there

    passes.main(sys.argv[2:])


if __name__ == "__main__":
    main()
