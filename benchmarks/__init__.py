"""Speed and memory against what users would run otherwise. `python -m benchmarks` makes every figure in the docs."""
