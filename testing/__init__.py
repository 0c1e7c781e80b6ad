"""What tests and benchmarks share: tolerances, the criterion, operators as problems."""
