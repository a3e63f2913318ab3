"""Inside vLLM's API server: reads and changes the policy of a running engine, over HTTP or from a policy volume."""
