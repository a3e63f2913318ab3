"""Which policy to try next, and which candidates the search hands to the certificate."""
