"""The custom resources as pure data: models, names, conditions, and the CRDs generated from them. No I/O."""
