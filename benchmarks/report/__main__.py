"""`python -m benchmarks.report`."""

from benchmarks.report.performance import main

if __name__ == "__main__":
    main()
