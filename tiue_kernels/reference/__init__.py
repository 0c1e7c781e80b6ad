"""What each operator means, in plain PyTorch: one file an operator, forward and backward."""
