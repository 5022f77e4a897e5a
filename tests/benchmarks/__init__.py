"""Benchmarks of the pipeline against its rivals, all measured in one run: ``python -m tests.benchmarks``."""
