"""What every part leans on and nothing of the method: processes, files, failures, progress."""
