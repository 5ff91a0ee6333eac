"""ACE-Step 1.5 as a library: planner, renderer and what they need. No Ray and no HTTP in here."""

import os

# Large tensors of a CPU in huge pages: the VAE writes hundreds of MB anew in each layer, and touching them page by page takes as long as the
# arithmetic. torch reads it at its first allocation.
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")

__version__ = "0.1.0"
