"""Audio in and out: reading of uploads, loudness, encoding to files, tags and the manifest beside each song."""
