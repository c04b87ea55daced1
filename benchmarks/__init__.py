"""What the relay costs and how fast it is, measured next to its limits and its peers; see docs/benchmarks.md."""
