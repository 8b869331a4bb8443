"""One file a task: what is asked, and what is right."""
