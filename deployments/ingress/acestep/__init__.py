"""ACE-Step's own HTTP API, so that clients written for its server work unchanged.

Field tables and look-up (`fields`), bodies in any encoding (`bodies`), the way from fields to a job (`submission`, and `editing` for its
source audio), and from a job to what a poll answers (`results`). Errors are `{"detail": ...}` here, or the envelope with a code, as that
server answers.
"""
