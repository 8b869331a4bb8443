"""A page that follows a log while the model works: only the file is read, and only this machine can see it."""
