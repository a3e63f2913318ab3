"""What a tuning run leaves behind: profile, summary, report page, screen, and the copy in the cluster."""
