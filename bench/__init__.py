"""weft measured against Docker's overlay, Docker's bridge and the bare underlay. See docs/benchmarks.md."""
