"""Who is next, where, and when. No I/O; the autoscaling policy is pickled by value, so nothing is imported here."""
