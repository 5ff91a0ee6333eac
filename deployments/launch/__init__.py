"""`acestep serve`: prepares, starts `serve run`, shows a person what happens, and ends it in order."""
