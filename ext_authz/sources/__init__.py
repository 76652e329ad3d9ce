"""What is fetched or watched: the issuers' keys, and files that other programs replace."""
