"""The stages that measure a GPU; docs/benchmarks/README.md says how to run them."""
