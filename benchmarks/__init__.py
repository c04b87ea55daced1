"""What relay and consumer cost and how fast they are, next to their limits and peers; see docs/benchmarks.md."""
