"""The training loop and what only it needs: optimizer, schedule, progress."""
