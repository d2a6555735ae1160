"""Programs that run in other namespaces than the benchmark itself, and print JSON."""
