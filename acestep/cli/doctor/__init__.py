"""What this machine can do with ACE-Step, and why: `acestep doctor`."""
