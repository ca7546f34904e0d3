"""Persistent knowledge: common benchmarks, through lm-evaluation-harness (mmcore/evaluation/harness.py)."""
