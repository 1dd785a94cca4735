"""L4, the simulation shell: virtual time, a modelled network, content-checked executors, faults, checkers. One seed is one run."""
