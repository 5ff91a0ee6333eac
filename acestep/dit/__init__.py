"""The renderer stage: conditions, denoising and VAE decoding of ACE-Step 1.5 for many songs at once."""
