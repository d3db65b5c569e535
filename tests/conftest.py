"""One thread for every test: the nets are tiny, the runners are shared, and bits depend on the number of threads."""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # also for the scripts that tests start
