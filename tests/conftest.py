"""One thread per test process: pytest runs as many as there are cores, and threads beyond that wait for each other."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
