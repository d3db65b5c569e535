"""What to run next, and where: knows directories and processes, nothing of networks."""
