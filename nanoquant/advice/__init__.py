"""What to use for a memory and a task, answered before anything is computed."""
