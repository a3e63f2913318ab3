"""Which policy pods are to serve, and how it reaches them: canary, judgement, promotion or the way back. Pure."""
