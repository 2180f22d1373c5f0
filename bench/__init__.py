"""Benchmarks against peft, each in a process of its own; `make bench` prints the table."""
