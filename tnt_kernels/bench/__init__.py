"""The benchmark engine: `python -m tnt_kernels bench` and the scripts of benchmarks/ run on it."""
