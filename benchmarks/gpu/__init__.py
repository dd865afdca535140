"""throughtime's layers on a GPU against everything else that computes them there: `python -m benchmarks.gpu`."""
