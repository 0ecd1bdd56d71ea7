"""Eight fake CPU devices for every test, so that sharded runs can be compared."""

import chex

chex.set_n_cpu_devices(8)
