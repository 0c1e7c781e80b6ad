"""`python -m tiue_kernels.compile cuda|host|cpu [--output FOLDER]` prints a library's path."""

import argparse
import sys
from pathlib import Path

from tiue_kernels import build


def main() -> None:
    """Compile one library, beside its loader or where the command line says."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("target", choices=build.LIBRARIES, help="what to compile for")
    parser.add_argument("--output", type=Path, help="folder of the library")
    arguments = parser.parse_args()
    target = arguments.target
    # Beside its loader, where it is found; the host library is for tests.
    folder = build.cache_folder() if target == "host" else Path(__file__).parent / target
    try:
        print(build.build(target, arguments.output or folder))
    except build.BuildError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
