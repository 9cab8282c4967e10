"""Everything that needs torch: a run's ranks, and operations on models and adapters."""

import logging

# Said while bitsandbytes 0.50 is imported, by peft or by us, on every CPU with AVX-512 BF16: that it has not fetched a
# kernel from a hub (its backends/cpu/ops.py). Too early for anything but this.
logging.getLogger("bitsandbytes.backends.cpu").setLevel(logging.ERROR)
