"""One measurement: labelled items sent as load to one engine under one policy, and what answers and latencies say."""
