"""Units of what is counted in more than one room."""

GIB = 2**30  # bytes
