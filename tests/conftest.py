"""Settings that libtpu reads when JAX first loads it."""

import os

# There is no metadata server to ask where no TPU is, and the workers of pytest-xdist each load
# libtpu, which compiles for chips that are not here.
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
