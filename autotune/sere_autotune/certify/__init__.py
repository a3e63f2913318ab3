"""The certificate: paired blocks of exact routing and a candidate on held-out items, and the verdict on them."""
