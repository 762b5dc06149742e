"""What happened: run folders, submission and the state of jobs."""
