"""The certificate from paired blocks of exact routing and a candidate on held-out items, and the most load that the certified policy holds."""
