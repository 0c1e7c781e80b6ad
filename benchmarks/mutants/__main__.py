"""`python -m benchmarks.mutants`."""

from benchmarks.mutants.run import main

if __name__ == "__main__":
    main()
