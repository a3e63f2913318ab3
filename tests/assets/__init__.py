"""What tests use that no code makes anew: a trained model, recorded vLLM symbols, resources that are accepted and refused."""
