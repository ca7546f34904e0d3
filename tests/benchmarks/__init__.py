"""Speed and memory beside other libraries: `python -m tests.benchmarks.bench_<what> [--json FILE]`.

Both sides take turns in one run and are compared round by round: this machine drifts by 10-30 % from minute to
minute, so a time alone says little.
"""
