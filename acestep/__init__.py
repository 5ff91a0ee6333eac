"""ACE-Step 1.5 as a library: planner, renderer and what they need. No Ray and no HTTP in here."""

__version__ = "0.1.0"
